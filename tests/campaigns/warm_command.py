"""The command in forks of a warm process: a point of a campaign then takes no interpreter start.

Run as a program, this is the warm process. It has the modules of the command and no threads of its
own; each fork is a session of its own, as a command in a terminal is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_POLLS = 0.01


class WarmProcess:
    """A process that forks commands; one per environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.folder.name],
            env=os.environ | {"COLUMNS": "200"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """Return the answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Command:
    """One command in a fork; `pid` is also the number of its process group."""

    def __init__(self, warm: WarmProcess, arguments: tuple[str, ...]) -> None:
        self.warm = warm
        self.returncode: int | None = None
        descriptor, self.output_path = tempfile.mkstemp(prefix="mmerge-campaign-")
        os.close(descriptor)
        self.pid: int = warm.ask(arguments=arguments, output=self.output_path)

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs."""
        if self.returncode is None:
            self.returncode = self.warm.ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float) -> str | None:
        """Return the output when the command has ended, None if it has not in some seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                return None
            time.sleep(SECONDS_BETWEEN_POLLS)
        path = Path(self.output_path)
        output = path.read_text(errors="replace")
        path.unlink()
        return output


_warm_processes: dict[tuple[tuple[str, str], ...], WarmProcess] = {}


def start_warm(*arguments: str, environment: dict[str, str]) -> Command:
    """Start the command in a fork of the warm process of an environment."""
    key = tuple(sorted(environment.items()))
    if key not in _warm_processes:
        _warm_processes[key] = WarmProcess(environment)
    return Command(_warm_processes[key], arguments)


def import_all(names: list[str]) -> None:
    """Import the modules that a finished command had, so that the next one finds them."""
    for name in names:
        if name.split(".")[0] not in {"ray", "__main__", "__mp_main__"}:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def run_command(arguments: list[str], output: str, modules_path: str) -> None:
    """Run the command in this process, which was forked for it, and end the process."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["mmerge", *arguments]
    from mmerge.pipeline.cli.main import main as run_main

    try:
        run_main()
    finally:
        if not Path(modules_path).exists():
            unfinished = Path(f"{modules_path}.{os.getpid()}")
            unfinished.write_text(json.dumps(list(sys.modules)))
            unfinished.rename(modules_path)


def serve(folder: str) -> None:
    """Answer requests from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    known: set[str] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer: Any = os.waitstatus_to_exitcode(status) if pid else None
        else:
            command = request["arguments"][0]
            modules_path = f"{folder}/{command}"
            if command not in known and Path(modules_path).exists():
                known.add(command)
                import_all(json.loads(Path(modules_path).read_text()))
            answer = os.fork()
            if answer == 0:
                run_command(request["arguments"], request["output"], modules_path)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
