"""Which tests may be skipped: the only list of accepted reasons, and the option that enforces it.

`pytest --strict-skips` fails the session if a test is skipped for any other reason, so that a
missing file or package cannot silently remove tests from continuous integration.
"""

from __future__ import annotations

import re

import pytest
from store_servers import SERVERS

ALLOWED_REASONS: dict[str, str] = {
    r"(needs a|no) CUDA device": "the machine has no GPU",
    r"there is a CUDA device": "the test checks the message on a machine without a GPU",
    r"triton is not installed": "the CPU build of torch comes without Triton",
    r"needs root, iproute2 and network namespaces": "partitions need privileges",
    r"needs 8 GiB of free memory": "the test fills a node's memory",
    r"needs kubectl, for its kustomize": "kubectl is not a Python package",
    r"which has tomllib": "Python 3.10 has no tomllib",
} | {
    re.escape(reason): f"the server {name} is optional"
    for name, (*_, reason) in SERVERS.items()
    if reason
}
"""Regular expression of a skip's message, and why that skip is acceptable."""

PASSING = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}


def is_allowed(reason: str) -> bool:
    """Return whether a skip's message contains one of the accepted reasons."""
    return any(re.search(pattern, reason) for pattern in ALLOWED_REASONS)


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Return the message of a skipped test or module; None if it was not skipped.

    An expected failure counts as run: pytest reports it as skipped, with `wasxfail`.
    """
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    details = report.longrepr
    message = details[2] if isinstance(details, tuple) else str(details)
    return message.removeprefix("Skipped: ")


class SkipPolicy:
    """Collects skips that the list does not allow and fails the session on them."""

    def __init__(self) -> None:
        self.unexpected: dict[str, str] = {}

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = skip_reason(report)
        if reason is not None and not is_allowed(reason):
            self.unexpected[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._record(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus in PASSING:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.unexpected:
            return
        terminalreporter.section("skips that tests/skip_policy.py does not allow", red=True)
        for test, reason in self.unexpected.items():
            terminalreporter.line(f"{test}: {reason}")


def add_option(parser: pytest.Parser) -> None:
    """Add `--strict-skips` to the command line of pytest."""
    help_text = "fail if a test is skipped for a reason that tests/skip_policy.py does not list"
    parser.addoption("--strict-skips", action="store_true", help=help_text)


def register(config: pytest.Config) -> None:
    """Enforce the list in this session if `--strict-skips` is given."""
    if config.getoption("strict_skips"):
        config.pluginmanager.register(SkipPolicy(), "skip-policy")
