"""Tensors of a build brought to the ranks that need them: each byte is read once, checked once, and
cut for every rank.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeVar

import torch
from typing_extensions import override

from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.composite.process_group import Ranks
from mmerge.workers.composite.routed_linear import Policy
from mmerge.workers.composite.routed_read import read_routed
from mmerge.workers.composite.tensor_parallel import Division, Part
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows, unpack_rows
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.runtime.cores import num_cores
from mmerge.workers.runtime.host_memory import Empty, empty_host

WINDOW_BYTES = 256 << 20
"""Stored bytes that are read ahead, at least, where the model is on other devices: host memory
beside it; or its largest shard, if that is larger.
"""
SHARED_WINDOW_BYTES = WINDOW_BYTES // 4
"""Of each of several ranks, or one tensor: what one reads is not what it keeps, and stands beside
its part of the model until it is given away.
"""
LOCAL_THREADS = 8
"""Threads that read a local store, if there are so many cores: each copies, digests and forms, so
that more would only take turns.
"""
REMOTE_THREADS = 4
"""Threads that read over a network, where they wait; a range of some size is several requests
already (manifests/stores/prefetch.py).
"""

_Result = TypeVar("_Result")
Kind = Literal["plain", "matrix", "bias"]


@dataclass(frozen=True)
class Field:
    """One tensor of several that belong to a name; `shape` is that of the whole."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A language-model tensor to load: a plain one, or the matrix or bias of a routed Linear."""

    name: str
    kind: Kind
    fields: tuple[Field, ...]
    num_bytes: int
    """Bytes that its owner reads from the store."""


class Fetcher:
    """Reads a build's language model: of text and all modalities, or of one expert."""

    def __init__(
        self,
        reader: BuildReader,
        *,
        expert: str | None,
        dtype: torch.dtype,
        policy: Policy,
        empty: Empty = empty_host,
    ) -> None:
        """Prepare; the weights of a routed Linear get their memory from `empty`."""
        self.reader, self.expert, self.dtype, self.policy, self._empty = (
            reader,
            expert,
            dtype,
            policy,
            empty,
        )
        self._is_routed = expert is None and reader.manifest.kind == "masks"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a language-model tensor as it is loaded."""
        reader = self.reader
        if self.expert and reader.has(
            own := reader.manifest.rename(name, expert=self.expert), "carried", self.expert
        ):
            return reader.shape(own, "carried", self.expert)
        shape = reader.shape(name, "merged" if reader.has(name, "merged") else "base")
        if self.expert and reader.has(name, "extra_rows", self.expert):
            return (shape[0] + reader.shape(name, "extra_rows", self.expert)[0], *shape[1:])
        return shape

    def is_routed(self, name: str) -> bool:
        """Return whether a tensor is weight or bias of a Linear layer with weights per modality."""
        path, _, kind = name.rpartition(".")
        weight = f"{path}.weight"
        if not self._is_routed or kind not in ("weight", "bias"):
            return False
        if not self.reader.has(weight, "delta"):
            return False
        return self.reader.family.is_routed_linear(path, self.reader.shape(weight, "base"))

    def make_item(self, name: str) -> Item:
        """Return what is loaded under a name. Placement and loader both decide by this."""
        shape, num_bytes = self.shape(name), self._stored_bytes(name)
        if not self.is_routed(name):
            dtype = self.dtype if self._dtype_of(name).is_floating_point else self._dtype_of(name)
            return Item(name, "plain", (Field("value", dtype, shape),), num_bytes)
        count = len(self.reader.expert_names)
        if len(shape) == 1:
            return Item(
                name,
                "bias",
                (Field("text", self.dtype, shape), Field("experts", self.dtype, (count, *shape))),
                num_bytes,
            )
        fields = [Field("text", self.dtype, shape)]
        if self.policy == "resident":
            fields.append(Field("modalities", self.dtype, (count, *shape)))
        elif count > 1:
            fields.append(Field("delta", self.reader.dtype_of(name, "delta"), shape))
            fields.append(Field("masks", torch.uint8, (count, shape[0], -(-shape[1] // 8))))
        return Item(name, "matrix", tuple(fields), num_bytes)

    def read(self, item: Item) -> dict[str, torch.Tensor]:
        """Return the whole tensors of an item. Raises DamagedObject when their bytes are not what
        the manifest says.
        """
        reader, name = self.reader, item.name
        if item.kind == "plain":
            value = reader.rebuild(name, self.expert) if self.expert else reader.text_weight(name)
            return {"value": value.to(item.fields[0].dtype)}
        if item.kind == "bias":
            experts = [
                reader.rebuild(name, expert).to(self.dtype) for expert in reader.expert_names
            ]
            return {
                "text": reader.text_weight(name).to(self.dtype),
                "experts": torch.stack(experts),
            }
        weights = read_routed(reader, name, dtype=self.dtype, policy=self.policy, empty=self._empty)
        found = {
            "text": weights.text,
            "delta": weights.delta,
            "masks": weights.masks,
            "modalities": weights.modalities,
        }
        return {name: value for name, value in found.items() if value is not None}

    def own_head(self) -> Item | None:
        """Return the head of an expert whose base is tied and has none, if the expert has one."""
        head = self.reader.family.head
        if not self.expert or head in self.reader.llm_names():
            return None
        own = self.reader.manifest.rename(head, expert=self.expert)
        if not self.reader.has(own, "carried", self.expert):
            return None
        shape = self.reader.shape(own, "carried", self.expert)
        num_bytes = self.reader.stored_bytes(own, "carried", self.expert)
        return Item(head, "plain", (Field("value", self.dtype, shape),), num_bytes)

    def _dtype_of(self, name: str) -> torch.dtype:
        role: Literal["merged", "base"] = "merged" if self.reader.has(name, "merged") else "base"
        return self.reader.dtype_of(name, role)

    def _stored_bytes(self, name: str) -> int:
        reader = self.reader
        experts = [self.expert] if self.expert else reader.expert_names
        if self.expert and (
            carried := reader.stored_bytes(
                reader.manifest.rename(name, expert=self.expert), "carried", self.expert
            )
        ):
            return carried
        if reader.has(name, "merged"):
            return reader.stored_bytes(name, "merged")
        masks = sum(reader.stored_bytes(name, "mask", expert) for expert in experts)
        extra = (
            sum(reader.stored_bytes(name, "extra_rows", expert) for expert in experts)
            if self.expert
            else 0
        )
        return (
            reader.stored_bytes(name, "base") + reader.stored_bytes(name, "delta") + masks + extra
        )


def cut(value: torch.Tensor, field: Field, part: Part, *, is_vector: bool) -> torch.Tensor:
    """Return a rank's part of a field, contiguous, padded with zeros where the part is longer than
    what there is.
    """
    if part.along == "whole":
        return value.contiguous()
    if field.name == "masks" and part.along == "columns":
        ((start, stop),) = part.ranges
        if start % 8 == 0 and part.size % 8 == 0:
            return value[..., start // 8 : stop // 8].contiguous()
        width = value.shape[-1] * 8
        masks = [unpack_rows(mask, width)[:, start:stop] for mask in value]
        return torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    dim = -1 if is_vector or part.along == "columns" else -2
    pieces = [value.narrow(dim, start, stop - start) for start, stop in part.ranges]
    piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
    if piece.shape[dim] < part.size:
        missing = [*piece.shape]
        missing[dim] = part.size - piece.shape[dim]
        piece = torch.cat([piece, piece.new_zeros(missing)], dim=dim)
    return piece.contiguous()


def part_shape(field: Field, part: Part, *, is_vector: bool) -> tuple[int, ...]:
    """Return the shape of what `cut` returns."""
    if part.along == "whole":
        return field.shape
    shape = list(field.shape)
    dim = -1 if is_vector or part.along == "columns" else -2
    shape[dim] = (
        -(-part.size // 8) if field.name == "masks" and part.along == "columns" else part.size
    )
    return tuple(shape)


def deliver(
    item: Item,
    ready: Iterator[Mapping[str, torch.Tensor]],
    *,
    ranks: Ranks,
    owner: int,
    division: Division,
) -> dict[str, torch.Tensor]:
    """Return this rank's part of each field of an item: the next that is ready where this rank is
    its owner, the one that read it.
    """
    if ranks.num_ranks == 1:
        return dict(next(ready))
    full = item.fields[0].shape
    is_vector = len(full) == 1
    parts = [division.part_of(item.name, full, rank=rank) for rank in range(ranks.num_ranks)]
    # One part at a time: a whole item and one part of it are all that stands beside what is read
    # ahead.
    given = (
        _cut_each(item, next(ready), parts, is_vector=is_vector) if owner == ranks.rank else None
    )
    shapes = [part_shape(field, parts[ranks.rank], is_vector=is_vector) for field in item.fields]
    sizes = [
        _padded(prod(shape) * field.dtype.itemsize)
        for field, shape in zip(item.fields, shapes, strict=True)
    ]
    received = ranks.scatter(given, source=owner, num_bytes=sum(sizes))
    found, start = {}, 0
    for field, shape, size in zip(item.fields, shapes, sizes, strict=True):
        raw = received[start : start + prod(shape) * field.dtype.itemsize]
        found[field.name] = raw.view(field.dtype).reshape(shape)
        start += size
    return found


def _cut_each(
    item: Item, whole: Mapping[str, torch.Tensor], parts: Sequence[Part], *, is_vector: bool
) -> Iterator[torch.Tensor]:
    """Yield the bytes of each rank's part of all fields, which is what `deliver` takes apart again."""
    for part in parts:
        yield torch.cat(
            [
                _to_raw(cut(whole[field.name], field, part, is_vector=is_vector))
                for field in item.fields
            ]
        )


def _padded(num_bytes: int) -> int:
    """Return the bytes that a field takes: fields of an item lie in one piece of memory, each from
    a cache line on.
    """
    return -(-num_bytes // 64) * 64


def _to_raw(value: torch.Tensor) -> torch.Tensor:
    raw = value.reshape(-1).view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, _padded(len(raw)) - len(raw)))


def share_out(sizes: Sequence[int], *, num_ranks: int, taken: Sequence[int] = ()) -> list[int]:
    """Return for each size a rank, so that every rank gets near the same sum: the largest first,
    each to who has least.
    """
    loads = list(taken) or [0] * num_ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owner = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += sizes[index]
    return owners


def read_threads(store: ReadableStore) -> int:
    """Return how many threads of this process read a build from a store; the ranks of one node
    share its cores.
    """
    if store.is_remote:
        return REMOTE_THREADS
    return max(1, min(LOCAL_THREADS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class ReadAhead(Iterator[_Result]):
    """What `read_ahead` gives: results in the order of their items. Further items may be added
    until the last result was taken.
    """

    def __init__(
        self, read: Callable[[Item], _Result], pool: ThreadPoolExecutor, window_bytes: int | None
    ) -> None:
        self._read, self._pool, self._window_bytes = read, pool, window_bytes
        self._waiting: deque[tuple[Item, Future[_Result]]] = deque()
        self._later: deque[Item] = deque()
        self._held = self._taken = 0
        """Bytes within the window, and those of them that the last result took."""

    def add(self, items: Sequence[Item]) -> None:
        """Read these too, behind those that were given before; as far as the window allows at once."""
        self._later.extend(items)
        self._read_on()

    def _read_on(self) -> None:
        while self._later and (not self._waiting or self._has_room(self._later[0])):
            item = self._later.popleft()
            self._waiting.append((item, self._pool.submit(self._read, item)))
            self._held += item.num_bytes

    def _has_room(self, item: Item) -> bool:
        return self._window_bytes is None or self._held + item.num_bytes <= self._window_bytes

    @override
    def __next__(self) -> _Result:
        # Whoever asks for the next has placed the one before.
        self._held -= self._taken
        self._taken = 0
        self._read_on()
        if not self._waiting:
            raise StopIteration
        item, future = self._waiting.popleft()
        self._taken = item.num_bytes
        return future.result()  # held by whoever takes it, and by nothing here

    def cancel(self) -> None:
        """Read nothing that was not begun."""
        for _, future in self._waiting:
            future.cancel()


@contextmanager
def read_ahead(
    items: Sequence[Item],
    read: Callable[[Item], _Result],
    *,
    num_threads: int,
    window_bytes: int | None,
) -> Iterator[ReadAhead[_Result]]:
    """Give `read(item)` of each item in order; threads begin at once and read ahead, at most
    `window_bytes` of stored bytes, or one item.

    Without a window they read as fast as they can. Leaving the context ends them behind the items
    that they are at.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-read") as pool:
        ahead = ReadAhead(read, pool, window_bytes)
        try:
            ahead.add(items)
            yield ahead
        finally:
            ahead.cancel()
