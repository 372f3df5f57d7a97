"""Digests of input bytes, taken while a task reads them and compared with those of the scan.

A task that follows the scan reads its inputs a second time. Whatever changed them in between (a
file that was replaced, a bit that flipped on the way) would be stored under a name that the earlier
bytes gave. So every reader hashes what it hands out, while the bytes are in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blake3 import blake3

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.sources import (
    BlockScaledSource,
    LowRankSource,
    TensorSource,
)


@dataclass(frozen=True)
class ChangedInput:
    """An input that was read and is not what it was before."""

    source: TensorSource
    """The rows that were read."""
    kind: Literal["bytes", "file"]
    """Whether the digest of the bytes differs, or the store's identity of a file."""
    expected: str
    """The digest of the scan, or the identity when the run began."""
    actual: str

    def describe(self) -> str:
        """Return the tensor, its files and both sides, without its owner."""
        where = " and ".join(list_files(self.source))
        if self.kind == "file":
            return (
                f"{self.source.spec.name}: {where}: was replaced while it was scanned: its"
                f" identity was {self.expected} and is {self.actual}"
            )
        return (
            f"{self.source.spec.name}: {where}: the scan read bytes of BLAKE3 {self.expected}, a"
            f" later pass bytes of {self.actual}"
        )


class InputChanged(CheckpointError):
    """Ends a task whose inputs changed; the driver scans them again."""

    def __init__(self, change: ChangedInput) -> None:
        self.change = change
        super().__init__(change.describe())

    def __reduce__(self) -> tuple[type[InputChanged], tuple[ChangedInput]]:
        return (type(self), (self.change,))


class PieceDigests:
    """BLAKE3 of the same rows in several sources, block by block."""

    def __init__(self, sources: Sequence[TensorSource], expected: Sequence[str] = ()) -> None:
        """Start a pass over `sources`; `expected` has the digest of each, or is empty."""
        self._sources, self._expected = sources, expected
        self._hashers = [blake3() for _ in sources]

    def update(self, raw: Sequence[memoryview]) -> None:
        """Add the bytes of a block, of each source in turn."""
        for hasher, data in zip(self._hashers, raw, strict=True):
            hasher.update(data)

    def hexdigests(self) -> list[str]:
        """Return the digest of each source so far."""
        return [str(hasher.hexdigest()) for hasher in self._hashers]

    def check(self) -> None:
        """Raise InputChanged if a digest differs from the expected one."""
        if not self._expected:
            return
        digests = zip(self._sources, self._expected, self.hexdigests(), strict=True)
        for source, expected, actual in digests:
            if actual != expected:
                raise InputChanged(ChangedInput(source, "bytes", expected, actual))


def check_identities(
    sources: Iterable[TensorSource], identities: dict[tuple[str, str], str]
) -> None:
    """Raise InputChanged if a file that was read is no longer the one that was to be read.

    Args:
        sources: whose files were read.
        identities: by URI and file, the identity that the result is stored under.
    """
    checked: set[tuple[str, str]] = set()
    for source in sources:
        for part in stored_parts(source):
            place = (part.uri, part.file)
            if place in checked:
                continue
            checked.add(place)
            actual = open_readable_store(part.uri).identity(part.file)
            if actual != identities[place]:
                raise InputChanged(ChangedInput(part, "file", identities[place], actual))


def stored_parts(source: TensorSource) -> Iterator[TensorSource]:
    """Yield the stored tensors that a source is formed from, itself where it is stored."""
    if isinstance(source, LowRankSource):
        for part in (source.base, source.a, source.b):
            yield from stored_parts(part)
    elif isinstance(source, BlockScaledSource):
        for part in (source.weights, source.scales):
            yield from stored_parts(part)
    else:
        yield source


def list_files(source: TensorSource) -> list[str]:
    """Return the files that a tensor is read from, each once."""
    return list(dict.fromkeys(f"{part.uri}/{part.file}" for part in stored_parts(source)))
