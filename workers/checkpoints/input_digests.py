"""Digests of input bytes, taken while a task reads them and compared with those of the scan.

A task that follows the scan reads its inputs a second time. Whatever changed them in between (a
file that was replaced, a bit that flipped on the way) would be stored under a name that the earlier
bytes gave. So every reader hashes what it hands out, while the bytes are in the processor's caches.

Two hash functions share the work. BLAKE3 names what was scanned: nobody can make other bytes of the
same digest. A later pass only has to notice that its bytes are not those of the scan, so it takes
XXH3 (128 bits), which the scan computes beside BLAKE3: 33 GB/s on cached blocks against 5 (a
multilinear hash in numba: 21 to 26). It notices flipped bits and other versions of a file, except
for one in 2¹²⁸. Bytes that collide could be prepared by someone who knows the seed; each scan draws
its own. XXH3 is never part of a name, and scans of version 0.1, which have none, are compared by
BLAKE3.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from blake3 import blake3
from xxhash import xxh3_128

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.sources import FormedSource, TensorSource


@dataclass(frozen=True)
class ChangedInput:
    """An input that was read and is not what it was before."""

    source: TensorSource
    """The rows that were read."""
    kind: Literal["bytes", "file"]
    """Whether the digest of the bytes differs, or the store's identity of a file."""
    expected: str
    """The hash of the scan, with its name, or the identity when the run began."""
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
            f"{self.source.spec.name}: {where}: the scan read bytes of {self.expected}, a later"
            f" pass bytes of {self.actual}"
        )


class InputChanged(CheckpointError):
    """Ends a task whose inputs changed; the driver scans them again."""

    def __init__(self, change: ChangedInput) -> None:
        self.change = change
        super().__init__(change.describe())

    def __reduce__(self) -> tuple[type[InputChanged], tuple[ChangedInput]]:
        return (type(self), (self.change,))


SEED_DIGITS = 16
"""Hex digits of the seed, in front of the 32 of the hash, in a checksum."""


def make_seed() -> int:
    """Return a seed for the checksums of one scan that nobody can foresee."""
    return secrets.randbits(4 * SEED_DIGITS)


class BlockDigests(Protocol):
    """Hashes the blocks of several sources while they are read.

    Calls, by the block reader: `update` with each block in order, then `check`, before the last
    block is handed out.
    """

    def update(self, raw: Sequence[memoryview]) -> None:
        """Add the bytes of a block, of each source in turn."""

    def check(self) -> None:
        """Raise InputChanged if the bytes are not those that were expected."""


class ScanDigests:
    """Digests and checksums of the same rows in several sources, for the pass that comes first."""

    def __init__(self, num_sources: int, *, seed: int) -> None:
        """Start a pass; `seed` is that of the checksums, from `make_seed`."""
        self._seed = seed
        self._digests = [blake3() for _ in range(num_sources)]
        self._checksums = [xxh3_128(seed=seed) for _ in range(num_sources)]

    def update(self, raw: Sequence[memoryview]) -> None:
        """Add the bytes of a block, of each source in turn."""
        for digest, checksum, data in zip(self._digests, self._checksums, raw, strict=True):
            digest.update(data)
            checksum.update(data)

    def check(self) -> None:
        """Do nothing: there is no earlier pass to compare with."""

    def hexdigests(self) -> list[str]:
        """Return the BLAKE3 digest of each source so far."""
        return [str(digest.hexdigest()) for digest in self._digests]

    def checksums(self) -> list[str]:
        """Return the seed and the XXH3 hash of each source so far, as hex digits."""
        seed = f"{self._seed:0{SEED_DIGITS}x}"
        return [seed + checksum.hexdigest() for checksum in self._checksums]


class PieceDigests:
    """Compares the same rows in several sources with what their scan read, block by block."""

    def __init__(
        self,
        sources: Sequence[TensorSource],
        digests: Sequence[str],
        *,
        checksums: Sequence[str] = (),
    ) -> None:
        """Start a pass over `sources`.

        Args:
            sources: what is read.
            digests: of each source, from its scan.
            checksums: of each source, from its scan; where they are absent, BLAKE3 is compared.
        """
        self._sources = sources
        self._expected = checksums or digests
        self._name = "XXH3" if checksums else "BLAKE3"
        self._hashers: list[blake3 | xxh3_128]
        if checksums:
            seeds = [int(checksum[:SEED_DIGITS], 16) for checksum in checksums]
            self._hashers = [xxh3_128(seed=seed) for seed in seeds]
        else:
            self._hashers = [blake3() for _ in sources]

    def update(self, raw: Sequence[memoryview]) -> None:
        """Add the bytes of a block, of each source in turn."""
        for hasher, data in zip(self._hashers, raw, strict=True):
            hasher.update(data)

    def check(self) -> None:
        """Raise InputChanged if the bytes of a source are not those of its scan."""
        hashed = zip(self._sources, self._expected, self._hashers, strict=True)
        for source, expected, hasher in hashed:
            seed = expected[:SEED_DIGITS] if self._name == "XXH3" else ""
            actual = seed + str(hasher.hexdigest())
            if actual != expected:
                names = (f"{self._name} {expected}", f"{self._name} {actual}")
                raise InputChanged(ChangedInput(source, "bytes", *names))


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
    if isinstance(source, FormedSource):
        for part in source.inputs:
            yield from stored_parts(part)
    else:
        yield source


def list_files(source: TensorSource) -> list[str]:
    """Return the files that a tensor is read from, each once."""
    return list(dict.fromkeys(f"{part.uri}/{part.file}" for part in stored_parts(source)))
