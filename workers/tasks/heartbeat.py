"""A sign of life from a task that takes long: a large matrix can be decomposed for minutes."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

log = logging.getLogger("mmerge.run")
PULSE_SECONDS = 30.0


class Pulse:
    """Logs at intervals what a task is working on, until it ends."""

    def __init__(self, name: str, *, num_steps: int, seconds: float = PULSE_SECONDS) -> None:
        """Name the task; `num_steps` is how many tensors it has, `seconds` how often it says where
        it is.
        """
        self._name, self._num_steps, self._seconds = name, num_steps, seconds
        self._step, self._what = 0, ""
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name=f"pulse {name}", daemon=True)

    def begin(self, what: str) -> None:
        """Say that the next step begins."""
        self._step += 1
        self._what = what

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            passed = time.monotonic() - self._began
            log.info(
                "%s: %d of %d, %s, after %.0f s",
                self._name,
                self._step,
                self._num_steps,
                self._what,
                passed,
            )
