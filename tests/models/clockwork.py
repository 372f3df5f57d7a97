"""Processes of a simulation: product code that runs one store call at a time, in simulated time.

A process is a thread that runs only while the scheduler waits for it, so that of all threads one
runs at any moment and every run with equal choices makes equal calls. Sleeping costs no real time:
the clock moves to the moment at which the sleeper wakes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

UNLIMITED = 1 << 60
SHORT, SHORT_STRIDE, LONG_STRIDE = 120.0, 1.0, 300.0
"""Seconds: up to which time background threads wake exactly, and how often they do over more."""
EPOCH = datetime(2030, 1, 1, tzinfo=timezone.utc)


class Killed(BaseException):
    """The process was killed: none of its further store calls has an effect."""


class Stuck(AssertionError):
    """A process neither ends nor waits: it made more store calls than any operation needs."""


_local = threading.local()


def current_process() -> Process | None:
    """Return the process whose thread this is, None in the thread of the test."""
    return getattr(_local, "process", None)


class Clock:
    """Simulated time in seconds, and the sleepers that it wakes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.sleepers: list[Process] = []

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.seconds)

    def advance_to(self, seconds: float) -> None:
        """Move to a moment; run the background threads whose time comes before it.

        Over a long time they wake once per stride, as on a busy machine, and not every few seconds.
        """
        stride = SHORT_STRIDE if seconds - self.seconds <= SHORT else LONG_STRIDE
        while self.seconds < seconds:
            target = min(seconds, self.seconds + stride)
            for process in sorted(self.sleepers, key=lambda process: process.order):
                if process.is_background and process.may_run and process.wakes <= target:
                    self.seconds = max(self.seconds, process.wakes)
                    process.advance(UNLIMITED)
            self.seconds = max(self.seconds, target)


class Process:
    """One process, or a background thread of one.

    `advance` runs it for a number of store calls; it stops earlier where it ends or sleeps.
    """

    def __init__(
        self,
        clock: Clock,
        name: str,
        function: Callable[[], Any],
        *,
        parent: Process | None = None,
        number: int = 0,
    ) -> None:
        self.clock, self.name, self.function = clock, name, function
        self.parent, self.number = parent, number
        self.is_background = parent is not None
        self.children: list[Process] = []
        self.is_suspended = self.is_killed = self.is_done = False
        self.wakes = 0.0
        self.num_calls = 0
        self.result: Any = None
        self.error: BaseException | None = None
        self.settings: dict[str, Any] = dict(parent.settings) if parent else {}
        self.bypasses: list[Any] = []
        """Worlds whose calls are no steps: those in which a task is recorded."""
        self.pending_verb = ""
        """Verb of the store call before which the process waits, if it does."""
        self._budget = 0
        self._stops_after_call = False
        self._mine, self._scheduler = threading.Lock(), threading.Lock()
        self._mine.acquire()
        self._scheduler.acquire()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._is_started = False

    @property
    def order(self) -> tuple[float, int]:
        """The order in which sleepers wake."""
        return self.wakes, self.number

    @property
    def may_run(self) -> bool:
        if self.parent is not None and (self.parent.is_suspended or self.parent.is_killed):
            return False
        return not (self.is_suspended or self.is_killed or self.is_done)

    @property
    def is_sleeping(self) -> bool:
        return self in self.clock.sleepers

    def advance(self, calls: int) -> None:
        """Run until `calls` more store calls were made, or the process sleeps or ends."""
        if self.is_done:
            return
        if self.is_sleeping:
            self.clock.sleepers.remove(self)
            self.clock.advance_to(self.wakes)
        self._budget = calls
        if not self._is_started:
            self._is_started = True
            self._thread.start()
        else:
            self._mine.release()
        self._scheduler.acquire()

    def run_to_end(self, *, most_calls: int = 100_000) -> Process:
        """Run the process alone until it ends."""
        while not self.is_done:
            if self.num_calls > most_calls:
                raise Stuck(f"{self.name}: {self.num_calls} store calls, and no end")
            self.advance(1000)
        return self

    def finish_call(self) -> None:
        """Make the store call before which the process waits, and stop before its answer is used.

        What the process does with the answer, its checks too, then happens when it goes on.
        """
        self._stops_after_call = True
        self.advance(1)

    def kill(self) -> None:
        """End the process at once: its cleanup runs, but reaches the store no more."""
        self.is_killed = True
        for process in [*self.children, self]:
            if process.is_done or not process._is_started:
                process.is_done = True
                continue
            process.is_killed = True
            process.wakes = self.clock.seconds
            process.advance(UNLIMITED)
            assert process.is_done

    def before_call(self, verb: str) -> None:
        """Wait for permission to make a store call. Raises Killed in a killed process."""
        if self.is_killed:
            raise Killed
        if self._budget <= 0:
            self.pending_verb = verb
            self._yield()
            self.pending_verb = ""
            if self.is_killed:
                raise Killed
        self._budget -= 1
        self.num_calls += 1

    def after_call(self) -> None:
        """Wait, where `finish_call` asked for it, before the answer to a store call is used."""
        if self._stops_after_call and not self.is_killed:
            self._stops_after_call = False
            self._yield()

    def sleep(self, seconds: float) -> None:
        """Sleep in simulated time."""
        if self.is_killed:
            return
        self.wakes = self.clock.seconds + seconds
        self.clock.sleepers.append(self)
        self._yield()

    def _yield(self) -> None:
        self._scheduler.release()
        self._mine.acquire()

    def _main(self) -> None:
        _local.process = self
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001
            self.error = error
        finally:
            self.is_done = True
            if self in self.clock.sleepers:
                self.clock.sleepers.remove(self)
            self._scheduler.release()
