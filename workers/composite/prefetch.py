"""Prefetch the tensors of a load: threads read ahead of the consumer, within a byte window."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from typing_extensions import override

from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.composite.weight_items import Item
from mmerge.workers.runtime.cores import num_cores

WINDOW_BYTES = 256 << 20
"""Stored bytes prefetched for a model on other devices, at least: host memory beside the model.

The largest shard where that is larger.
"""
RANK_WINDOW_BYTES = WINDOW_BYTES // 4
"""The same for each of several ranks, or one tensor; a rank sends most of it to other ranks."""
LOCAL_THREADS = 8
"""Threads that read a local store, at most one per core: each copies, hashes and reconstructs."""
REMOTE_THREADS = 4
"""Threads that read over a network, where they wait.

A large range is several requests already (manifests/stores/prefetch.py).
"""

_Result = TypeVar("_Result")


class Prefetcher(Iterator[_Result]):
    """Results in the order of their items, read ahead by a thread pool. Made by `prefetch`.

    Call order: `add` items at any time before the last result is taken; `next` per item.
    """

    def __init__(
        self, read: Callable[[Item], _Result], pool: ThreadPoolExecutor, *, window: int | None
    ) -> None:
        self._read, self._pool, self._window = read, pool, window
        self._submitted: deque[tuple[Item, Future[_Result]]] = deque()
        self._queued: deque[Item] = deque()
        self._window_used = 0
        """Bytes of the items that are submitted, and of the last result."""
        self._last_bytes = 0

    def add(self, items: Sequence[Item]) -> None:
        """Queue further items, and submit those that the window has room for."""
        self._queued.extend(items)
        self._submit()

    def _submit(self) -> None:
        while self._queued and (not self._submitted or self._fits(self._queued[0])):
            item = self._queued.popleft()
            self._submitted.append((item, self._pool.submit(self._read, item)))
            self._window_used += item.num_bytes

    def _fits(self, item: Item) -> bool:
        return self._window is None or self._window_used + item.num_bytes <= self._window

    @override
    def __next__(self) -> _Result:
        # The consumer has released the previous result by now.
        self._window_used -= self._last_bytes
        self._last_bytes = 0
        self._submit()
        if not self._submitted:
            raise StopIteration
        item, future = self._submitted.popleft()
        self._last_bytes = item.num_bytes
        return future.result()  # no reference is kept here: the consumer decides when it is freed

    def cancel(self) -> None:
        """Cancel the reads that have not begun."""
        for _, future in self._submitted:
            future.cancel()


@contextmanager
def prefetch(
    items: Sequence[Item],
    read: Callable[[Item], _Result],
    *,
    num_threads: int,
    window_bytes: int | None,
) -> Iterator[Prefetcher[_Result]]:
    """Yield an iterator of `read(item)` per item, in order; threads begin at once.

    Leaving the context ends them after the items that they are reading.

    Args:
        items: to read; more can be added.
        read: called on threads of the pool.
        num_threads: of the pool.
        window_bytes: the stored bytes in memory at once, or one item; no limit if None.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-read") as pool:
        prefetcher = Prefetcher(read, pool, window=window_bytes)
        try:
            prefetcher.add(items)
            yield prefetcher
        finally:
            prefetcher.cancel()


def read_threads(store: ReadableStore) -> int:
    """Return how many threads of this process read a build; the ranks of a node share its cores."""
    if store.is_remote:
        return REMOTE_THREADS
    return max(1, min(LOCAL_THREADS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
