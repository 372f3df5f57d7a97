"""Run mypy on a plain install of the package: type checkers are blind under an editable one.

The package is copied into a folder as an installation would lay it out (mmerge/pipeline, …) and
checked there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return mypy's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            str(target),
            str(ROOT),
        ]
        subprocess.run(command, check=True)
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
        config = str(ROOT / "pyproject.toml")
        cache = str(ROOT / ".mypy_cache")
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "mypy",
                "--config-file",
                config,
                "--cache-dir",
                cache,
                "-p",
                "mmerge",
            ],
            cwd=target,
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
