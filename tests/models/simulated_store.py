"""A store of a simulation: every call is a step of the scheduler, and may fail, lie or be lost.

A `World` is one store with its clock. Product code reaches it as `model://NAME`, through a thin
store (`SimulatedStore`), or through the project's own object store over a simulated bucket
(`simulated_bucket.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, TypeVar

from blake3 import blake3
from models.clockwork import EPOCH, Clock, Process, current_process

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreUnavailable
from mmerge.manifests.stores.base import MAX_READ_BYTES, Listed, OnPart, Store, check_key
from mmerge.manifests.stores.writer import BufferedSink

WRITES = frozenset({"put", "put_new", "delete"})
ERRORS = ("before", "lost")
"""The call fails: before its effect, or after it (its answer is lost)."""
REPEATS = ("twice",)
"""The request arrives twice, and the answer to the second one is returned."""
LIES = ("swallow", "flip", "short", "conflict")
"""A write is reported as done, but nothing, or other bytes, or not all bytes are stored.

`conflict` is the answer 409 of an S3 server to one of several concurrent creates.
"""
TRACE_PIECE = 1000
"""Steps that are added to the digest of a trace at once."""
Observer = Callable[["World", Process | None, str, str, bytes | None], None]
ChooseFault = Callable[[Process, str, str], str | None]
_Result = TypeVar("_Result")
_worlds: weakref.WeakValueDictionary[str, World] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Stored:
    """Bytes of one object, the time of its last change, and its version."""

    data: bytes
    seconds: float
    version: int

    @cached_property
    def modified(self) -> datetime:
        """The time of the last change."""
        return EPOCH + timedelta(seconds=self.seconds)


class World:
    """One store, its clock and its faults.

    `observers` see every effect (process, verb, key, bytes) at the moment at which it happens, so
    that an invariant which is broken for a single step is found.
    """

    def __init__(
        self,
        name: str,
        *,
        is_remote: bool = False,
        medium: Store | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.is_remote, self.medium = name, is_remote, medium
        self.clock = clock or Clock()
        self.objects: dict[str, Stored] = {}
        self.observers: list[Observer] = []
        self.make_store: Callable[[World], Store] | None = None
        """Makes the store that `model://NAME` opens; a `SimulatedStore` if absent."""
        self.choose_fault: ChooseFault = lambda process, verb, key: None
        self.damaged: set[str] = set()
        """Keys whose last write the store lied about."""
        self.is_repair = False
        """Whether the write that observers see is one of a damaged object."""
        self.num_steps = 0
        self.num_processes = 0
        self._digest = blake3()
        self._trace: list[str] = []
        """Steps that are not in the digest yet."""
        _worlds[name] = self

    @property
    def uri(self) -> str:
        return f"model://{self.name}"

    def start(self, name: str, function: Callable[[], Any], **settings: Any) -> Process:
        """Return a new process, which has made no call yet."""
        self.num_processes += 1
        process = Process(self.clock, name, function, number=self.num_processes)
        process.settings |= settings
        return process

    def trace(self) -> str:
        """Return a digest of every step so far: who called what, and how it ended."""
        self._digest_trace()
        return str(self._digest.hexdigest())

    def call(self, verb: str, key: str, effect: Callable[[str | None], _Result]) -> _Result:
        """Make one store call of the current process, with the fault that is chosen for it.

        `effect` receives the lie that the store tells about the call, None if it is honest.
        """
        process = current_process()
        if process is None or self in process.bypasses:
            return effect(None)
        process.before_call(verb)
        try:
            return self._call(process, verb, key, effect)
        finally:
            process.after_call()

    def _call(
        self, process: Process, verb: str, key: str, effect: Callable[[str | None], _Result]
    ) -> _Result:
        self.num_steps += 1
        fault = self.choose_fault(process, verb, key)
        self._note(process, verb, key, fault or "")
        if fault == "before":
            raise StoreUnavailable(f"{self.uri}: {key}: 503 Slow Down")
        if fault == "twice" and verb in WRITES:
            effect(None)
        result = effect(fault if fault in LIES else None)
        if fault == "lost":
            raise StoreUnavailable(f"{self.uri}: {key}: connection reset")
        return result

    def _note(self, process: Process, *words: str) -> None:
        self._trace.append("\0".join((process.name, *words, "\n")))
        if len(self._trace) > TRACE_PIECE:
            self._digest_trace()

    def _digest_trace(self) -> None:
        self._digest.update("".join(self._trace).encode())
        self._trace.clear()

    def store(self, key: str, data: bytes, *, replace: bool, lie: str | None = None) -> None:
        """Keep the bytes of one object. Raises AlreadyExists."""
        if not replace and key in self.objects:
            raise AlreadyExists(f"{self.uri}: {key}: already exists")
        if lie == "conflict":
            lie = None  # only a bucket answers so
        kept = data if current_process() is None else distort(data, lie)
        self.is_repair = key in self.damaged
        if kept is None or kept != data:
            self.damaged.add(key)
        else:
            self.damaged.discard(key)
        if kept is None:
            return
        if self.medium is not None:
            self.medium.put(key, kept)
        version = self.objects[key].version + 1 if key in self.objects else self.num_steps
        self.objects[key] = Stored(kept, self.clock.seconds, version)
        for observer in self.observers:
            observer(self, current_process(), "put", key, kept if lie is None else None)

    def remove(self, key: str) -> None:
        """Delete one object, if it is there."""
        if key not in self.objects:
            return
        for observer in self.observers:
            observer(self, current_process(), "delete", key, None)
        del self.objects[key]
        if self.medium is not None:
            self.medium.delete(key)

    def find(self, key: str) -> Stored:
        """Return one object; its bytes come from the medium. Raises NotFound."""
        stored = self.objects.get(key)
        if stored is None:
            raise NotFound(f"{self.uri}: {key}: not found")
        if self.medium is not None:
            return Stored(self.medium.read(key), stored.seconds, stored.version)
        return stored

    def read(self, key: str, lie: str | None = None) -> bytes:
        """Return the bytes of one object, or what a lying store says that they are."""
        data = self.find(key).data
        return distort(data, lie) or b""

    def list_below(self, folder: str) -> list[Listed]:
        """Return the objects whose key begins with `folder`."""
        return [
            Listed(key, len(stored.data), stored.modified)
            for key, stored in self.objects.items()
            if key.startswith(folder)
        ]


def distort(data: bytes, lie: str | None) -> bytes | None:
    """Return what a lying store keeps or returns of `data`; None: nothing."""
    if lie == "swallow":
        return None
    if lie == "short":
        return data[:-1]
    if lie == "flip" and data:
        position = len(data) // 2
        return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
    return data


def find_world(uri: str) -> World:
    """Return the world of a URI `model://NAME`. Raises NotFound."""
    world = _worlds.get(uri.partition("://")[2].rstrip("/"))
    if world is None:
        raise NotFound(f"{uri}: no such world")
    return world


class SimulatedStore(Store):
    """The store of a world, without any code of a real backend."""

    is_remote = False

    def __init__(self, world: World) -> None:
        self.world, self.uri = world, world.uri
        self.is_remote = world.is_remote  # type: ignore[misc]

    @classmethod
    def open(cls, uri: str, *, create: bool) -> Any:
        world = find_world(uri)
        return world.make_store(world) if world.make_store else cls(world)

    def num_bytes(self, key: str) -> int:
        check_key(key)
        return self.world.call("num_bytes", key, lambda lie: len(self.world.find(key).data))

    def identity(self, key: str) -> str:
        check_key(key)
        return self.world.call("identity", key, lambda lie: str(self.world.find(key).version))

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        check_key(key)
        data = self.world.call("read", key, lambda lie: self.world.read(key, lie))
        self.check_read_size(key, len(data), max_bytes=max_bytes)
        return data

    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        check_key(key)
        data = self.world.call("read_range", key, lambda lie: self.world.read(key, lie))
        self.check_range_end(key, offset=offset, num_bytes=num_bytes, end=len(data))
        part = memoryview(data)[offset : offset + num_bytes]
        on_part(part)
        return part

    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        yield from self.world.call("list", prefix, lambda lie: self.world.list_below(folder))

    def put_new(self, key: str, data: bytes) -> None:
        self._put("put_new", key, bytes(data))

    def put(self, key: str, data: bytes) -> None:
        self._put("put", key, bytes(data))

    def _put(self, verb: str, key: str, data: bytes) -> None:
        check_key(key)
        replace = verb == "put"
        self.world.call(
            verb, key, lambda lie: self.world.store(key, data, replace=replace, lie=lie)
        )

    def open_sink(self, key: str) -> BufferedSink:
        return BufferedSink(lambda data: self.put(key, data))

    def delete(self, key: str) -> None:
        check_key(key)
        self.world.call("delete", key, lambda lie: self.world.remove(key))
