"""Builds as jobs of a Ray cluster, submitted and followed through its dashboard.

A submission uploads this package as a wheel together with the recipe; the job's log is streamed
back.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import os
import re
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from mmerge.manifests.digest import SHOWN_DIGITS, digest_json
from mmerge.manifests.errors import MmergeError, RecipeError, first_line
from mmerge.pipeline.recipes.inputs import describe_slices
from mmerge.pipeline.recipes.parsing import read_recipe, read_recipe_mapping
from mmerge.pipeline.recipes.recipe import Recipe

IfRunning = Literal["follow", "skip", "fail"]
PACKAGES = ("manifests", "workers", "pipeline")
WHEEL_TIME = (2020, 1, 1, 0, 0, 0)
"""Timestamp of all files in a wheel: equal code gives equal bytes, which a cluster stores once."""
ALIVE = ("PENDING", "RUNNING")
READY_SECONDS = 120.0
"""Time limit for a newly started cluster to accept a job."""


@dataclass(frozen=True)
class Job:
    """One job of the cluster that builds a composite; times in seconds since 1970."""

    id: str
    status: str
    recipe: str
    store: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def is_alive(self) -> bool:
        """Whether the job is queued or runs."""
        return self.status in ALIVE


def make_wheel(folder: Path) -> Path:
    """Write the running package as a wheel into `folder` and return its path.

    The wheel declares no dependencies. Ray installs it with pip on every node, whose image has all
    of them; pip would download torch otherwise.
    """
    import mmerge.manifests
    import mmerge.pipeline
    import mmerge.workers

    version = metadata("mmerge")["Version"]
    name = f"mmerge-{version}"
    contents = {
        f"{name}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: mmerge\nVersion: {version}\n".encode()
        ),
        f"{name}.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: mmerge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    for package, module in zip(
        PACKAGES, (mmerge.manifests, mmerge.workers, mmerge.pipeline), strict=True
    ):
        root = Path(next(iter(module.__path__)))
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                contents[f"mmerge/{package}/{path.relative_to(root).as_posix()}"] = (
                    path.read_bytes()
                )
    record = "".join(
        f"{key},sha256={_to_record_digest(data)},{len(data)}\n" for key, data in contents.items()
    )
    contents[f"{name}.dist-info/RECORD"] = (record + f"{name}.dist-info/RECORD,,\n").encode()
    # Ray caches a wheel by its file name. The digest of the contents, as build tag, distinguishes
    # versions of the code.
    wheel = (
        folder
        / f"{name}-0_{hashlib.sha256(record.encode()).hexdigest()[:SHOWN_DIGITS]}-py3-none-any.whl"
    )
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in contents.items():
            archive.writestr(zipfile.ZipInfo(key, WHEEL_TIME), data)
    return wheel


def _to_record_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


class Jobs:
    """The jobs of the cluster whose dashboard is at `address` (http://HOST:8265)."""

    def __init__(self, address: str | None) -> None:
        """Connect to the dashboard.

        Raises:
            MmergeError: no dashboard answers, or its client is not installed.
        """
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise MmergeError(
                "jobs need Ray's dashboard client: pip install 'mmerge[cluster]'"
            ) from error
        self.address = (
            address
            or os.environ.get("RAY_API_SERVER_ADDRESS")
            or os.environ.get("RAY_ADDRESS")
            or "http://localhost:8265"
        )
        try:
            self._client: Any = JobSubmissionClient(self.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MmergeError(
                f"{self.address}: no dashboard answers ({first_line(error)}). Give its address:"
                " --address http://HEAD:8265"
            ) from error

    def list_builds(self) -> list[Job]:
        """Return all builds among the cluster's jobs, the oldest first."""
        jobs = [_to_job(info) for info in self._client.list_jobs()]
        builds = [job for job in jobs if job is not None]
        return sorted(builds, key=lambda job: job.started or 0.0)

    def find(self, job_id: str) -> Job:
        """Return one job. Raises MmergeError when the cluster does not know it."""
        try:
            job = _to_job(self._client.get_job_info(job_id))
        except RuntimeError as error:
            raise MmergeError(
                f"{self.address}: no job {job_id!r} ({first_line(error)}). 'mmerge jobs' lists them"
            ) from error
        if job is None:
            raise MmergeError(f"{self.address}: job {job_id!r} builds no composite")
        return job

    def submit(
        self, recipe_path: Path, *, options: list[str], if_running: IfRunning = "follow"
    ) -> tuple[Job, bool]:
        """Return the job that builds a recipe, and whether it is new.

        A cluster accepts a submission id once. The id is derived from the recipe and a number: of
        two simultaneous submissions the cluster refuses one, which then finds the accepted job.

        Args:
            recipe_path: the recipe's file; local paths in it must be those of the cluster's nodes.
            options: further options of `mmerge run`.
            if_running: if a job of the recipe is queued or runs: return that job, or raise.

        Raises:
            RecipeError: the recipe is not valid.
            MmergeError: the cluster refuses the job, is not ready within two minutes, or
                `if_running` is "fail" and such a job exists.
        """
        recipe = read_recipe(recipe_path)
        text = to_absolute(recipe_path, recipe)
        prefix = f"mmerge-{recipe.name}-{digest_json(text)[:SHOWN_DIGITS]}"
        while True:
            earlier = [job for job in self.list_builds() if job.id.rpartition("-")[0] == prefix]
            alive = next((job for job in earlier if job.is_alive), None)
            if alive is not None:
                if if_running == "fail":
                    raise MmergeError(
                        f"{recipe.name}: job {alive.id} builds this recipe already. Follow it, or"
                        f" end it with 'ray job stop {alive.id}'"
                    )
                return alive, False
            number = max((int(job.id.rpartition("-")[2]) for job in earlier), default=0) + 1
            if self._submit(f"{prefix}-{number}", recipe, text, options):
                return self.find(f"{prefix}-{number}"), True

    def _submit(self, job_id: str, recipe: Recipe, text: str, options: list[str]) -> bool:
        """Submit a job; return False if its id exists already."""
        with tempfile.TemporaryDirectory() as folder:
            wheel = make_wheel(Path(folder))
            data = Path(folder) / "data"
            data.mkdir()
            (data / "recipe.yaml").write_text(text, encoding="utf-8")
            command = [
                "python",
                "-m",
                "mmerge.pipeline.cli.main",
                "run",
                "recipe.yaml",
                "--address",
                "auto",
                *options,
            ]
            end = time.monotonic() + READY_SECONDS
            while True:
                try:
                    self._client.submit_job(
                        submission_id=job_id,
                        entrypoint=shlex.join(command),
                        # The wheel holds the code; the working folder holds only the recipe.
                        runtime_env={
                            "py_modules": [str(wheel)],
                            "working_dir": str(data),
                            "env_vars": {"PYTHONUNBUFFERED": "1"},
                        },
                        metadata={"mmerge_recipe": recipe.name, "mmerge_store": recipe.output},
                    )
                    return True
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return False
                    if "No available agent" in str(error) and time.monotonic() < end:
                        time.sleep(1)  # the cluster was started moments ago
                        continue
                    raise MmergeError(
                        f"{self.address}: the job was refused ({first_line(error)})"
                    ) from error

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Pass the job's log to `write` as it grows; return the job once it has ended."""
        written = 0
        while True:
            try:
                for text in self._read_log(job_id, skip=written):
                    written += len(text)
                    write(text)
            except (ConnectionError, OSError, RuntimeError, asyncio.TimeoutError):
                time.sleep(2)  # dashboard unreachable: resume after the written part
            job = self.find(job_id)
            if not job.is_alive:
                unwritten = str(self._client.get_job_logs(job_id))[written:]
                if unwritten:
                    write(unwritten)
                return job
            time.sleep(0.2)

    def _read_log(self, job_id: str, *, skip: int) -> Iterator[str]:
        loop = asyncio.new_event_loop()
        stream = self._client.tail_job_logs(job_id)
        try:
            while True:
                try:
                    text = str(loop.run_until_complete(stream.__anext__()))
                except StopAsyncIteration:
                    return
                dropped, skip = min(skip, len(text)), max(0, skip - len(text))
                if text[dropped:]:
                    yield text[dropped:]
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()


def to_exit_code(job: Job) -> int:
    """Return the exit code of an ended job: its driver's, 143 if stopped, 1 if never started."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 143
    return job.exit_code or 1


def to_absolute(path: Path, recipe: Recipe) -> str:
    """Return a recipe's text with its name and absolute paths, valid in any working folder.

    A mergekit YAML is sent as the recipe that it stands for.

    Raises:
        RecipeError: the output is a store in this process's memory.
    """
    if recipe.output.startswith("memory://"):
        raise RecipeError(
            f"output: {recipe.output} cannot be seen from a cluster; give a store that every node"
            " can write"
        )
    raw: Any = read_recipe_mapping(path)
    raw = copy.deepcopy(raw)  # YAML's aliases are one object: each expert gets its own path
    raw |= {"name": recipe.name, "output": recipe.output}
    if recipe.has_base:
        raw["base"] = recipe.base
        if recipe.base_adapter:
            raw["base_lora"] = recipe.base_adapter
        if recipe.base_slices:
            raw["base_slices"] = describe_slices(recipe.base_slices)
    raw["experts"] = {name: dict(expert) for name, expert in raw["experts"].items()}
    for expert in recipe.experts:
        keys = raw["experts"][expert.name]
        keys["path"] = expert.uri
        if expert.adapter:
            keys["lora"] = expert.adapter
        if expert.slices:
            keys["slices"] = describe_slices(expert.slices)
    if recipe.vocabulary is not None:
        raw["tokenizer"] = recipe.vocabulary.to_keys()
    return str(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))


def _to_job(info: Any) -> Job | None:
    labels = info.metadata or {}
    if "mmerge_recipe" not in labels or not info.submission_id:
        return None
    return Job(
        id=info.submission_id,
        status=str(getattr(info.status, "value", info.status)),
        recipe=labels["mmerge_recipe"],
        store=labels.get("mmerge_store", ""),
        started=info.start_time / 1000 if info.start_time else None,
        ended=info.end_time / 1000 if info.end_time else None,
        exit_code=info.driver_exit_code,
        message=re.sub(r"\s+", " ", info.message or ""),
    )
