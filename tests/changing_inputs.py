"""Inputs of a build that change while it runs, for the tests of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress
from mmerge.workers.task import TaskResult


class ChangeAt(LogProgress):
    """Changes an input once, when the first task of a phase begins or has ended."""

    def __init__(self, phase: str, change: Callable[[], object], *, at_end: bool = False) -> None:
        super().__init__()
        self.phase, self.change, self.at_end = phase, change, at_end
        self.is_changed = False

    def _change(self, phase: str, at_end: bool) -> None:
        if phase == self.phase and at_end == self.at_end and not self.is_changed:
            self.is_changed = True
            self.change()

    def begin(self, phase: str, **counts: int) -> None:
        super().begin(phase, **counts)
        self._change(phase, at_end=False)

    def advance(self, phase: str, result: TaskResult) -> None:
        super().advance(phase, result)
        self._change(phase, at_end=True)


class Inputs:
    """Checkpoints of the lab, and another version of each of their files."""

    def __init__(self, lab: Any) -> None:
        self.lab, self.folder = lab, lab.folder
        lab.config |= {"num_hidden_layers": 2}
        self.raw: dict[str, Any] = lab.make_all(2)

    def file(self, name: str) -> Path:
        return self.folder / name / "model.safetensors"

    def other_version(self, name: str) -> bytes:
        """Return the file of a checkpoint with other values at the same places."""
        tensors = load_file(self.file(name))
        changed = {
            key: value + 0.25 if value.is_floating_point() else value
            for key, value in tensors.items()
        }
        path = self.folder / "other.safetensors"
        save_file(changed, path, metadata={"format": "pt"})
        return path.read_bytes()

    def recipe(self, store: str, **parameters: Any) -> Any:
        raw = self.raw | {"output": store} | parameters
        return parse_recipe(raw, folder=self.folder)

    def run(self, store: str, *, progress: Any = None, executor: Any = None, **raw: Any) -> Any:
        plan = make_plan(self.recipe(store, **raw))
        return run(plan, progress=progress, executor=executor or SerialExecutor(num_threads=1))

    def expect(self, name: str = "truth", **raw: Any) -> str:
        """Return the digest of the build of the files as they are, made in a store of its own."""
        build: str = self.run(name, **raw).build
        return build


def replace(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".new")
    partial.write_bytes(data)
    partial.replace(path)


def read_objects(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("objects/*.safetensors")}


def assert_no_object_is_wrong(store: Path, *truths: Path) -> None:
    """Every object of `store` that a true store has as well has the same bytes there."""
    for truth in truths:
        true_objects = read_objects(truth)
        for name, data in read_objects(store).items():
            assert true_objects.get(name, data) == data, name
