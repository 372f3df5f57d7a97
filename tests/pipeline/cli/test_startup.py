"""Commands start without torch, whose import takes longer than many merges."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
from mmerge.pipeline.cli.main import main

for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    assert "torch._C" not in sys.modules, command
"""
IMPORTED = re.compile(r"^import time:.*\| +torch$", re.MULTILINE)


def run_commands(lab: Any, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands one after another in a new process that reports imports, its children too."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", SCRIPT, json.dumps(commands)],
        cwd=lab.folder,
        capture_output=True,
        text=True,
        check=False,
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert not IMPORTED.search(done.stderr)


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_a_compiled_method_is_planned_and_run_without_torch(lab: Any, executor: str) -> None:
    recipe = str(lab.write_recipe(lab.make_all(2)))
    check(run_commands(lab, ["plan", recipe], ["run", recipe, "--executor", executor]))


def test_commands_about_stores_do_without_torch(lab: Any) -> None:
    recipe = str(lab.write_recipe(lab.make_all(2)))
    store = str(lab.folder / "store")
    check(run_commands(lab, ["run", recipe, "--executor", "serial"], ["run", recipe]))
    check(
        run_commands(
            lab,
            ["--help"],
            ["show", store],
            ["verify", store],
            ["status", store],
            ["log", store],
            ["gc", store],
            ["copy", store, str(lab.folder / "copy")],
        )
    )
