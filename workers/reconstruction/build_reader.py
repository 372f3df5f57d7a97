"""Read the tensors of a build: byte ranges from its table, checked against digests and headers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from mmerge.manifests.errors import (
    REPAIR,
    DamagedObject,
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.manifest import Manifest, read_file
from mmerge.manifests.format.object_header import describe_row
from mmerge.manifests.format.table import StoredRow
from mmerge.manifests.maintenance.check_build import open_checked_build
from mmerge.manifests.maintenance.tensor_checks import group_pieces
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES, to_bytes
from mmerge.workers.families.interface import Family
from mmerge.workers.families.registry import find_family, parse_config, text_config_of
from mmerge.workers.reconstruction.bitmask import pack_mask, unpack_mask
from mmerge.workers.runtime.host_memory import empty_tensor

BLOCK_BYTES = 1 << 20
"""Bytes read and hashed together, so that the digest finds them in a cache."""


class BuildReader:
    """One build: its manifest, and its tensors read on demand. Threads may share a reader.

    `bytes_read` counts the bytes of tensors that were read.
    """

    def __init__(self, uri: str) -> None:
        """Open the build at `uri`.

        Raises:
            StoreError, ManifestError: the build is missing or damaged: every object's size and
                header are compared, whether its tensors are read or not.
        """
        checked = open_checked_build(uri, level="structure")
        self.uri = uri
        self.store: ReadableStore = checked.store
        self.manifest: Manifest = checked.manifest
        self.bytes_read = 0
        self._lock = Lock()
        self._rows = group_pieces(checked.rows)
        for row in checked.rows:
            if row.dtype not in TORCH_DTYPES:
                raise ManifestError(
                    f"{uri}: {describe_row(row)} has dtype {row.dtype}, which torch does not have"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the build, and of the weights rebuilt from it."""
        return TORCH_DTYPES[self.manifest.dtype]

    @property
    def expert_names(self) -> list[str]:
        """The experts in recipe order; a modality id is an index into this list."""
        return [expert.name for expert in self.manifest.experts]

    @cached_property
    def family(self) -> Family:
        """The family of the language model. Raises CheckpointError, ManifestError."""
        entry = next(
            (file for file in self.manifest.base.files if file.name == "config.json"), None
        )
        where = f"{self.uri}: config.json of the base"
        config: dict[str, Any] = {}
        if entry is not None:
            try:
                config = parse_config(read_file(self.store, entry), where=where)
            except ValueError as error:
                raise ManifestError(f"{error}. Build it again from a whole checkpoint") from error
        shapes = {}
        for name in self.llm_names():
            role: Role = "merged" if self.has(name, "merged") else "base"
            shapes[name] = self.shape(name, role)
        return find_family(shapes, text_config_of(config), where=self.uri)

    def rows(self) -> Iterator[StoredRow]:
        """Yield every stored piece of every tensor, without statistics."""
        return itertools.chain.from_iterable(self._rows.values())

    def largest_shard_bytes(self) -> int:
        """Return the stored bytes of the largest shard of the language model.

        θ₀ counts, although objects of base weights may hold it apart from what was merged.
        """
        sizes: Counter[str] = Counter()
        for row in self.rows():
            if row.role != "carried":
                sizes[row.shard.removeprefix("base/")] += row.num_bytes
        return max(sizes.values(), default=0)

    def names(self, role: Role, expert: str = "") -> list[str]:
        """Return the names of all tensors of a role, sorted."""
        return sorted(
            name for row_role, owner, name in self._rows if row_role == role and owner == expert
        )

    def base_names(self) -> list[str]:
        """Return the stored names of all of the base's tensors, sorted."""
        return sorted({*self.names("base"), *self.names("merged")})

    def llm_names(self) -> list[str]:
        """Return the names of all language-model tensors, sorted: all of the base's."""
        return self.base_names()

    def stored_name(self, name: str, role: Role | None = None) -> str:
        """Return the name under which the build stores a tensor that `llm_names` lists."""
        return name

    def expert_name(self, name: str, *, expert: str) -> str:
        """Return the name that a tensor of `llm_names` has in the files of an expert."""
        return self.manifest.rename(self.stored_name(name), expert=expert)

    def encoder_names(self, expert: str) -> list[str]:
        """Return the names, in an expert's files, of its encoder and connector tensors.

        These are its copied tensors without those of its language model.
        """
        language_model = {
            self.expert_name(name, expert=expert) for name in [*self.llm_names(), self.family.head]
        }
        return [name for name in self.names("carried", expert) if name not in language_model]

    def has(self, name: str, role: Role, expert: str = "") -> bool:
        """Return whether the build has this tensor."""
        return (role, expert, self.stored_name(name, role)) in self._rows

    def num_rows(self, name: str, role: Role, expert: str = "") -> int:
        """Return the first dimension of a tensor."""
        return self._pieces(name, role, expert)[-1].row_stop

    def shape(self, name: str, role: Role, expert: str = "") -> tuple[int, ...]:
        """Return the shape of a tensor."""
        rows = self._pieces(name, role, expert)
        if not rows[0].shape:
            return ()
        # The rows that an expert added to the vocabulary begin after those of the base.
        return (rows[-1].row_stop - rows[0].row_start, *rows[0].shape[1:])

    def dtype_of(self, name: str, role: Role, expert: str = "") -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        return TORCH_DTYPES[self._pieces(name, role, expert)[0].dtype]

    def stored_bytes(self, name: str, role: Role, expert: str = "") -> int:
        """Return the stored bytes of a tensor, 0 where the build has none of that name."""
        rows = self._rows.get((role, expert, self.stored_name(name, role)), ())
        return sum(row.num_bytes for row in rows)

    def digests(self, name: str, role: Role, expert: str = "") -> tuple[str, ...]:
        """Return the digests of a tensor's pieces, none where the build has none of that name."""
        rows = self._rows.get((role, expert, self.stored_name(name, role)), ())
        return tuple(row.digest for row in rows)

    def read(self, name: str, role: Role, expert: str = "") -> torch.Tensor:
        """Return one stored tensor.

        Raises:
            DamagedObject: its bytes do not match the digest in the manifest.
        """
        rows = self._pieces(name, role, expert)
        tensor = empty_tensor(self.shape(name, role, expert), dtype=TORCH_DTYPES[rows[0].dtype])
        raw, start = np.frombuffer(to_bytes(tensor), np.uint8), 0
        for row in rows:
            self.read_into(row, raw[start : start + row.num_bytes])
            start += row.num_bytes
        return tensor

    def rescaler(self, expert: str) -> float:
        """Return the factor of an expert's masked τ⋆; 1 for methods without one."""
        rescaler = self.manifest.to_expert(expert).rescaler
        return 1.0 if rescaler is None else rescaler

    def read_packed_mask(self, name: str, expert: str) -> torch.Tensor:
        """Return an expert's packed mask of one tensor, uint8, see `bitmask.pack_mask`."""
        rows = self._pieces(name, "mask", expert)
        packed = [self._read_packed(row) for row in rows]
        if len(rows) == 1:
            return packed[0]
        # Each piece ends on whole words, so pieces cannot be concatenated as bytes.
        masks = [unpack_mask(bits, row.shape) for bits, row in zip(packed, rows, strict=True)]
        return pack_mask(torch.cat(masks))

    def masked_pieces(self, name: str, experts: Sequence[str] = ()) -> list[Sequence[StoredRow]]:
        """Return the stored rows of θ₀, τ⋆ and each expert's mask (all experts by default)."""
        masks = [self._pieces(name, "mask", expert) for expert in experts or self.expert_names]
        return [self._pieces(name, "base", ""), self._pieces(name, "delta", ""), *masks]

    def read_into(self, row: StoredRow, into: NDArray[np.uint8]) -> None:
        """Read one piece of a tensor to `into`, uint8 [row.num_bytes].

        Raises:
            DamagedObject: its bytes do not match the digest in the manifest.
        """
        for _ in self.read_blocks(row, block_bytes=BLOCK_BYTES, into=into):
            pass

    def read_blocks(
        self, row: StoredRow, *, block_bytes: int, into: NDArray[np.uint8] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield one piece of a tensor in blocks, as `ReadableStore.read_blocks`, and hash it.

        Raises:
            DamagedObject: after the last block, if the digest is not that of the manifest; results
                computed from the blocks are then void.
        """
        digest = blake3()
        try:
            blocks = self.store.read_blocks(
                row.object,
                offset=row.offset,
                num_bytes=row.num_bytes,
                block_bytes=block_bytes,
                into=into,
            )
            for block in blocks:
                digest.update(block.data)
                yield block
        except NotFound as error:
            raise DamagedObject(
                f"{self.store.uri}: {row.object} is missing; it holds {row.name}. {REPAIR}"
            ) from error
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise DamagedObject(
                f"{Exception.__str__(error)}; {row.name} ({row.role}) is not whole. {REPAIR}"
            ) from error
        if digest.hexdigest() != row.digest:
            raise DamagedObject(
                f"{self.store.uri}: {row.object}: {row.name} ({row.role}) is damaged. {REPAIR}"
            )
        with self._lock:
            self.bytes_read += row.num_bytes

    def _pieces(self, name: str, role: Role, expert: str) -> list[StoredRow]:
        rows = self._rows.get((role, expert, self.stored_name(name, role)))
        if not rows:
            owner = f" of expert {expert!r}" if expert else ""
            raise ManifestError(f"{self.uri}: the build has no {role} tensor {name}{owner}")
        return rows

    def _read_packed(self, row: StoredRow) -> torch.Tensor:
        packed = empty_tensor((row.num_bytes,), dtype=torch.uint8)
        self.read_into(row, packed.numpy())
        return packed
