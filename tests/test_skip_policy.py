"""`--strict-skips` fails a session that skips a test for a reason nobody allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from skip_policy import is_allowed
from store_servers import SERVERS

TESTS = Path(__file__).resolve().parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from skip_policy import add_option as pytest_addoption
from skip_policy import register as pytest_configure
"""
MODULE_SKIP = "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"
TEST_SKIP = "import pytest\n\ndef test_it():\n    pytest.skip({reason!r})\n"
EXPECTED_FAILURE = (
    "import pytest\n\n@pytest.mark.xfail(reason={reason!r})\ndef test_it():\n    assert 0\n"
)


def run_pytest(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_sample.py").write_text(source + "\ndef test_other():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("template", [MODULE_SKIP, TEST_SKIP])
def test_an_unlisted_skip_fails_the_session_and_is_named(template: str, tmp_path: Path) -> None:
    source = template.format(reason="no folder ../data")
    result = run_pytest(tmp_path, source, "--strict-skips")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "test_sample.py" in result.stdout
    assert ": no folder ../data" in result.stdout


@pytest.mark.parametrize(
    ("template", "reason", "options"),
    [
        (TEST_SKIP, "needs a CUDA device", ["--strict-skips"]),
        (EXPECTED_FAILURE, "no folder ../data", ["--strict-skips"]),
        (TEST_SKIP, "no folder ../data", []),
    ],
)
def test_a_listed_skip_an_expected_failure_and_a_lenient_session_pass(
    template: str, reason: str, options: list[str], tmp_path: Path
) -> None:
    result = run_pytest(tmp_path, template.format(reason=reason), *options)
    assert result.returncode == pytest.ExitCode.OK, result.stdout


@pytest.mark.parametrize("name", [name for name in SERVERS if name != "moto"])
def test_a_store_server_may_be_missing(name: str) -> None:
    assert is_allowed(SERVERS[name][2])


def test_a_missing_dependency_may_not_skip_tests() -> None:
    assert not is_allowed("could not import 'ray': No module named 'ray'")
