"""Run mypy on a plain install of the package, because type checkers cannot follow an editable one.

The package is installed into a temporary folder (mmerge/pipeline, …) and checked there; the scripts
of benchmarks/ are then checked against it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return 0 if neither the package nor the benchmarks have type errors."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        install_into(site)
        codes = [run_mypy(site, "-p", "mmerge"), run_mypy(site, str(ROOT / "benchmarks"))]
    return max(codes)


def install_into(site: Path) -> None:
    """Install the package without its dependencies into a folder."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(ROOT)]
    subprocess.run(command, check=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)


def run_mypy(site: Path, *targets: str) -> int:
    """Return mypy's exit code; `mmerge` is found in `site`, scripts in benchmarks/ and tests/."""
    options = ["--config-file", str(ROOT / "pyproject.toml")]
    options += ["--cache-dir", str(ROOT / ".mypy_cache")]
    environment = os.environ | {"MYPYPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "mypy", *options, *targets]
    return subprocess.run(command, cwd=site, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
