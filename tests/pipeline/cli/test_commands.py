"""The registry of commands: one source of help, entry points, options that two commands share."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import invoke
from typer.main import get_command

from mmerge.pipeline.cli import commands
from mmerge.pipeline.cli.commands import COMMANDS, load_function, read_summary, to_summary
from mmerge.pipeline.cli.options import BuildOptions

LOCAL_OPTIONS = {"recipe", "executor", "address", "workers", "memory"}
"""Options of `run` that concern the machine it is started on; `submit` has its own `--address`."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package with a command of its own on the import path, as pip would; return its code."""
    code = tmp_path / "fake_plugin.py"
    code.write_text(
        '"""A plugin."""\n\n'
        "def greet(name: str) -> None:\n"
        '    """Greet somebody.\n\n    At length.\n    """\n'
        '    print(f"hello {name}")\n\n\n'
        "def run() -> None:\n"
        '    """Replace a built-in command."""\n'
    )
    metadata = tmp_path / "fake_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[mmerge.commands]\n"
        "greet = fake_plugin:greet\n"
        "run = fake_plugin:run\n"
        "broken = fake_plugin:missing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_plugin", raising=False)
    commands._read_docstrings.cache_clear()
    return code


def options_of(name: str) -> dict[str, Any]:
    """Return the parameters of a command as the command line sees them."""
    app = typer.Typer(add_completion=False)
    app.command(name)(load_function(name, COMMANDS[name]))
    return {parameter.name: parameter for parameter in get_command(app).params}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_is_read_without_importing_it(name: str) -> None:
    summary = read_summary(COMMANDS[name])
    function = load_function(name, COMMANDS[name])
    assert summary == to_summary(inspect.getdoc(function))
    assert summary.endswith(".")
    assert len(summary) <= 100


def test_help_takes_less_than_300_ms_of_processor_time() -> None:
    code = (
        "import time; from mmerge.pipeline.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "import sys; print(time.process_time(), file=sys.stderr)"
    )
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        times.append(float(done.stderr.strip().splitlines()[-1]))
    assert min(times) < 0.3


def test_a_package_adds_a_command_by_entry_point(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, overview, _ = invoke(capsys, "--help")
    assert "  greet         Greet somebody.\n" in overview
    assert "fake_plugin" not in sys.modules, "the overview imports nothing"
    assert invoke(capsys, "greet", "Ada")[:2] == (0, "hello Ada\n")
    assert "At length." in invoke(capsys, "greet", "--help")[1]
    _, _, message = invoke(capsys, "gret")
    assert "Did you mean 'greet'?" in message


def test_a_package_cannot_replace_a_built_in_command(plugin: Path) -> None:
    assert commands.find_target("run") == COMMANDS["run"]
    assert commands.list_targets()["run"] == COMMANDS["run"]


def test_a_command_that_cannot_be_loaded_is_one_error_and_spoils_no_other(
    plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, message = invoke(capsys, "broken")
    assert code == 1
    assert "command 'broken': its entry point 'fake_plugin:missing' cannot be loaded" in message
    assert invoke(capsys, "--help")[0] == 0
    assert invoke(capsys, "methods")[0] == 0


def test_submit_has_every_option_of_run_that_does_not_concern_this_machine() -> None:
    run, submit = options_of("run"), options_of("submit")
    shared = run.keys() - LOCAL_OPTIONS
    assert shared == {field.name for field in dataclasses.fields(BuildOptions)}
    assert shared <= submit.keys()
    for name in shared:
        assert submit[name].opts == run[name].opts
        assert submit[name].help == run[name].help
        assert submit[name].default == run[name].default


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(
            fresh=False,
            verify_reused=False,
            one_pass=False,
            exclusive=False,
            task_deadline=None,
            block_entries=None,
        ),
        BuildOptions(
            fresh=True,
            verify_reused=True,
            one_pass=True,
            exclusive=True,
            task_deadline=90.5,
            block_entries=65536,
        ),
    ],
)
def test_run_reads_what_submit_passes_on(options: BuildOptions) -> None:
    app = typer.Typer(add_completion=False)
    app.command("run")(load_function("run", COMMANDS["run"]))
    context = get_command(app).make_context("run", ["recipe.yaml", *options.to_arguments()])
    passed = {name: context.params[name] for name in dataclasses.asdict(options)}
    assert passed == dataclasses.asdict(options)
