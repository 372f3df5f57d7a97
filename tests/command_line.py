"""The command line, run in this process."""

from __future__ import annotations

import pytest

from mmerge.pipeline.cli.main import main


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it printed to both streams."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 1), printed.out, printed.err
