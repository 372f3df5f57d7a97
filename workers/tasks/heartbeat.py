"""Heartbeat logging of long tasks: the SVD of a large matrix can take minutes."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

log = logging.getLogger("mmerge.run")
HEARTBEAT_SECONDS = 30.0


class Heartbeat:
    """Logs at intervals which step a task is at, while it is used as a context manager."""

    def __init__(self, name: str, *, num_steps: int, seconds: float = HEARTBEAT_SECONDS) -> None:
        """Name the task. It has `num_steps` steps, and logs every `seconds`."""
        self._name, self._num_steps, self._seconds = name, num_steps, seconds
        self._step, self._description = 0, ""
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._log, name=f"heartbeat {name}", daemon=True)

    def start_step(self, description: str) -> None:
        """Note that the next step starts."""
        self._step += 1
        self._description = description

    def __enter__(self) -> Heartbeat:
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

    def _log(self) -> None:
        while not self._ended.wait(self._seconds):
            log.info(
                "%s: %d of %d, %s, after %.0f s",
                self._name,
                self._step,
                self._num_steps,
                self._description,
                time.monotonic() - self._began,
            )
