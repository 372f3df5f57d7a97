"""Progress of a run: bars on a terminal, otherwise one log line per finished shard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichBars
from typing_extensions import override

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.redaction import redact
from mmerge.workers.task import TaskResult

log = logging.getLogger("mmerge.run")


class Progress(Protocol):
    """Receives the events of a run: phases, finished and failed shards, the build's digest."""

    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        """A phase begins, or gets further work if it has begun already.

        Args:
            phase: the phase.
            num_bytes: bytes of input that the tasks will read.
            num_tasks: tasks to run.
            num_reused: shards whose results are in the store already.
        """

    def advance(self, phase: str, result: TaskResult) -> None:
        """One shard is finished."""

    def fail(self, phase: str, shard: str, error: Exception) -> None:
        """One shard failed."""

    def name_build(self, build: str) -> None:
        """The digest of the build has been computed; ignored by default."""
        return


class SeveralProgress(Progress):
    """Forwards every event to several progress objects."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        self._parts = tuple(parts)

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        for part in self._parts:
            part.begin(phase, num_bytes=num_bytes, num_tasks=num_tasks, num_reused=num_reused)

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        for part in self._parts:
            part.advance(phase, result)

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        for part in self._parts:
            part.fail(phase, shard, error)

    @override
    def name_build(self, build: str) -> None:
        for part in self._parts:
            part.name_build(build)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON.

    The keys are time, level, logger and message, and those of `fields` in the record's `extra`.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(
            timespec="milliseconds"
        )
        event = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(event, ensure_ascii=True, default=str))


class LogProgress(Progress):
    """Logs one event per line, with phase, shard and build as fields for `JsonFormatter`."""

    def __init__(self) -> None:
        self._build: str | None = None
        self._begun: set[str] = set()

    def _extra(self, phase: str, **fields: object) -> dict[str, dict[str, object]]:
        return {"fields": {"phase": phase, "build": self._build, **fields}}

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        if phase in self._begun and num_tasks + num_reused <= 1:
            return
        self._begun.add(phase)
        extra = self._extra(phase, num_tasks=num_tasks, num_reused=num_reused, num_bytes=num_bytes)
        log.info(
            "%s: %d shards, %d there already, %s to read",
            phase,
            num_tasks + num_reused,
            num_reused,
            to_size(num_bytes),
            extra=extra,
        )

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        extra = self._extra(
            phase,
            shard=result.shard,
            num_bytes=result.num_bytes,
            seconds=result.seconds,
            reused=result.reused,
        )
        if result.reused:
            log.info("%s %s: there already", phase, result.shard, extra=extra)
            return
        speed = to_size(round(result.num_bytes / max(result.seconds, 1e-6)))
        log.info(
            "%s %s: %s in %.2f s (%s/s)",
            phase,
            result.shard,
            to_size(result.num_bytes),
            result.seconds,
            speed,
            extra=extra,
        )

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        log.error("%s %s: failed: %s", phase, shard, error, extra=self._extra(phase, shard=shard))

    @override
    def name_build(self, build: str) -> None:
        self._build = build
        log.info("build %s", build[:SHOWN_DIGITS], extra={"fields": {"build": build}})


class BarProgress(Progress):
    """Shows a bar per phase with bytes, bytes per second and remaining time."""

    def __init__(self, console: Console) -> None:
        self._bars = RichBars(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}
        self._num_left: dict[str, int] = {}

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        self._totals[phase] = self._totals.get(phase, 0) + num_bytes
        self._num_left[phase] = self._num_left.get(phase, 0) + num_tasks
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=None, note="")
        if num_reused:
            self._bars.update(self._tasks[phase], note=f"{num_reused} shards there already")
        self._bars.update(self._tasks[phase], total=max(self._totals[phase], 1))
        self._fill_if_done(phase)

    def _fill_if_done(self, phase: str) -> None:
        # Reused results are not read, so the bar would end short of its total.
        if not self._num_left[phase]:
            self._bars.update(self._tasks[phase], completed=max(self._totals[phase], 1))

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        self._bars.advance(self._tasks[phase], result.num_bytes)
        self._num_left[phase] -= 1
        self._fill_if_done(phase)

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        self._bars.update(self._tasks[phase], note=f"{shard} failed")


def to_size(num_bytes: float) -> str:
    """Return a size as text in decimal units, such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Yield the progress display: bars if `console` is a terminal, otherwise log lines."""
    if console.is_terminal:
        with BarProgress(console) as bars:
            yield bars
    else:
        yield LogProgress()
