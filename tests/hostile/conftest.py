"""What every hostile input must meet: refused soon, in little memory, with one message."""

from __future__ import annotations

import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke

MAX_SECONDS = 20.0
"""Of this process's CPU, which does not depend on what else the machine does."""
MAX_WAIT = 120.0
"""By the clock: nothing may wait for what never comes."""
MAX_GROWTH = 1 << 30
"""Bytes by which the peak of the process's memory may grow."""
Refuse = Callable[..., str]


def check_output(text: str) -> None:
    """Nothing that is printed can drive a terminal."""
    assert all(character.isprintable() or character in "\n\t" for character in text), repr(text)


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must refuse; return what it says on stderr."""

    def run(*arguments: object, code: int = 1) -> str:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu_began = time.monotonic(), time.process_time()
        actual_code, out, err = invoke(capsys, *map(str, arguments))
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        assert time.process_time() - cpu_began < MAX_SECONDS
        assert time.monotonic() - began < MAX_WAIT
        assert growth < MAX_GROWTH
        assert actual_code == code, (out, err)
        assert "Traceback" not in err
        assert "fault of mmerge" not in err, err
        if code == 1:
            assert len(re.findall("^error:", err, re.MULTILINE)) == 1, err
        check_output(out + err)
        return err

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts, small and random; never changed."""
    from conftest import Lab

    lab = Lab(tmp_path_factory.mktemp("models"))
    lab.make_all(2)
    return lab.folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the models that a test may damage."""
    for name in ("base", "image", "audio"):
        shutil.copytree(models / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def composite_loaded(lab_store: str) -> Iterator[Any]:
    """The composite of the lab, loaded once for all prompts of a module."""
    from mmerge.pipeline import load_composite
    from mmerge.pipeline.cli import generate

    composite = load_composite(f"{lab_store}#mmer")
    patch = pytest.MonkeyPatch()
    patch.setattr(generate, "_load", lambda *_, **__: composite)
    yield composite
    patch.undo()
