"""A store in memory whose clock is set by a test, and the timing of leases by the same clock."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from mmerge.manifests.maintenance.lease import Timing
from mmerge.manifests.stores.memory import MemoryStore


class ClockedStore(MemoryStore):
    """Objects have the time that the test has set; `on_call` sees each verb before it happens."""

    def __init__(self) -> None:
        super().__init__(f"memory://clocked-{uuid.uuid4().hex}")
        self.seconds = 0.0
        self.on_call: Callable[[str, str], None] = lambda verb, key: None

    def advance(self, *, minutes: float) -> None:
        self.seconds += 60 * minutes

    def timing(self, *, is_clock_stopped: bool = False) -> Timing:
        """Return a timing by this clock, or one whose process does not see time pass."""

        def pause(seconds: float) -> None:
            self.seconds += seconds

        start = self.seconds
        return Timing(
            now=(lambda: start) if is_clock_stopped else (lambda: self.seconds),
            sleep=pause,
            make_id=lambda: uuid.uuid4().hex[:8],
            is_renewed_by_thread=False,
        )

    def _put(self, key: str, data: bytes, *, replace: bool) -> None:
        self.on_call("put" if replace else "put_new", key)
        super()._put(key, data, replace=replace)
        self._set_time(key)

    def _set_time(self, key: str) -> None:
        time = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=self.seconds)
        self._contents.objects[key] = replace(self._contents.objects[key], modified=time)

    def delete(self, key: str) -> None:
        self.on_call("delete", key)
        super().delete(key)

    def num_bytes(self, key: str) -> int:
        self.on_call("num_bytes", key)
        return super().num_bytes(key)

    def list_objects(self, prefix: str = "") -> Any:
        listed = list(super().list_objects(prefix))
        self.on_call("list", prefix)
        return iter(listed)


def once(store: ClockedStore, verb: str, prefix: str, act: Callable[[], object]) -> None:
    """Call `act` once, at the first such verb on a key with this prefix."""

    def watch(called_verb: str, key: str) -> None:
        if called_verb == verb and key.startswith(prefix):
            store.on_call = lambda verb, key: None
            act()

    store.on_call = watch
