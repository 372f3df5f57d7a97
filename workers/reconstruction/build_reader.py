"""Tensors of a build by name: the byte ranges that the table names, with their digests and the
headers of their objects checked.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from threading import Lock

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import (
    DamagedObject,
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.manifest import Manifest, read_file, read_manifest
from mmerge.manifests.format.object_header import find_header_damage
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import StoredRow, read_table
from mmerge.manifests.maintenance.verify import group_rows
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES, to_bytes
from mmerge.workers.checkpoints.lora_weights import LowRank, add_adapters
from mmerge.workers.families.interface import Family
from mmerge.workers.families.registry import find_family, text_config_of
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows, unpack_mask
from mmerge.workers.reconstruction.masked_read import read_formed
from mmerge.workers.reconstruction.masked_weights import can_form, form
from mmerge.workers.reconstruction.table_checks import check_rows
from mmerge.workers.runtime.host_memory import empty_host

BLOCK_BYTES = 1 << 20
"""Bytes that are read and digested at once: the digest finds them in a cache."""


class BuildReader:
    """One build: its manifest, and its tensors read on demand. `bytes_read` counts the bytes of
    tensors that were fetched.
    """

    def __init__(self, uri: str) -> None:
        """Open the build at `uri`. Raises StoreError, ManifestError."""
        self.uri = uri
        self.store: ReadableStore
        self.store, build = open_build(uri)
        self.manifest: Manifest = read_manifest(self.store, build)
        self.bytes_read = 0
        self._count = Lock()
        self._rows: dict[tuple[str, str, str], list[StoredRow]] = defaultdict(list)
        table = read_table(self.store, self.manifest.table, with_statistics=False)
        self._groups = group_rows(table)
        self._entries = {entry.key: entry for entry in self.manifest.entries}
        self._checked: set[str] = set()
        for row in table:
            self._rows[(row.role, row.expert, row.name)].append(row)
        for rows in self._rows.values():
            rows.sort(key=lambda row: row.row_start)
        check_rows(self._rows, uri=uri)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the build was written, and in which rebuilt weights are given."""
        return TORCH_DTYPES[self.manifest.dtype]

    @property
    def expert_names(self) -> list[str]:
        """The experts in recipe order; a modality id is a position in this list."""
        return [expert.name for expert in self.manifest.experts]

    @cached_property
    def family(self) -> Family:
        """The family of the language model. Raises CheckpointError, ManifestError."""
        entry = next(
            (file for file in self.manifest.base.files if file.name == "config.json"), None
        )
        where = f"{self.uri}: config.json of the base"
        config = {}
        if entry is not None:
            config = parse_json(read_file(self.store, entry), what=where)
        shapes = {}
        for name in self.llm_names():
            role: Role = "merged" if self.has(name, "merged") else "base"
            shapes[name] = self.shape(name, role)
        return find_family(shapes, text_config_of(config), where=self.uri)

    def rows(self) -> Iterator[StoredRow]:
        """Yield every piece of every tensor, without statistics."""
        return itertools.chain.from_iterable(self._rows.values())

    def largest_shard_bytes(self) -> int:
        """Return the stored bytes of the largest shard, θ₀ included, which objects of base weights
        may hold apart from what was merged.
        """
        sizes: Counter[str] = Counter()
        for row in self.rows():
            if row.role != "carried":
                sizes[row.shard.removeprefix("base/")] += row.num_bytes
        return max(sizes.values(), default=0)

    def names(self, role: Role, expert: str = "") -> list[str]:
        """Return the names of all tensors of a role, sorted."""
        return sorted(
            name for found, owner, name in self._rows if found == role and owner == expert
        )

    def llm_names(self) -> list[str]:
        """Return the names of all language-model tensors, sorted."""
        return sorted({*self.names("base"), *self.names("merged")})

    def encoder_names(self, expert: str) -> list[str]:
        """Return the names in an expert's files of its encoder and connector: all carried tensors
        but those of its language model.
        """
        language_model = {
            self.manifest.rename(name, expert=expert)
            for name in [*self.llm_names(), self.family.head]
        }
        return [name for name in self.names("carried", expert) if name not in language_model]

    def has(self, name: str, role: Role, expert: str = "") -> bool:
        """Return whether there is such a tensor."""
        return (role, expert, name) in self._rows

    def num_rows(self, name: str, role: Role, expert: str = "") -> int:
        """Return the first dimension of a tensor."""
        return self._pieces(name, role, expert)[-1].row_stop

    def shape(self, name: str, role: Role, expert: str = "") -> tuple[int, ...]:
        """Return the shape of a tensor."""
        rows = self._pieces(name, role, expert)
        return (
            (rows[-1].row_stop - rows[0].row_start, *rows[0].shape[1:]) if rows[0].shape else ()
        )  # rows that were added begin later

    def dtype_of(self, name: str, role: Role, expert: str = "") -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        return TORCH_DTYPES[self._pieces(name, role, expert)[0].dtype]

    def stored_bytes(self, name: str, role: Role, expert: str = "") -> int:
        """Return the bytes that a tensor takes in the store, 0 where there is none."""
        return sum(row.num_bytes for row in self._rows.get((role, expert, name), ()))

    def read(self, name: str, role: Role, expert: str = "") -> torch.Tensor:
        """Return one stored tensor. Raises DamagedObject when its bytes are not what the manifest
        says.
        """
        rows = self._pieces(name, role, expert)
        out = empty_host(self.shape(name, role, expert), TORCH_DTYPES[rows[0].dtype])
        raw, start = np.frombuffer(to_bytes(out), np.uint8), 0
        for row in rows:
            self.read_into(row, raw[start : start + row.num_bytes])
            start += row.num_bytes
        return out

    def rescaler(self, expert: str) -> float:
        """Return the factor on an expert's masked τ⋆; 1 for methods that have none."""
        found = self.manifest.to_expert(expert).rescaler
        return 1.0 if found is None else found

    def read_packed_mask(self, name: str, expert: str) -> torch.Tensor:
        """Return an expert's mask of one tensor, packed (uint8, see
        workers/reconstruction/bitmask.py).
        """
        rows = self._pieces(name, "mask", expert)
        packed = [self._read_packed(row) for row in rows]
        if len(rows) == 1:
            return packed[0]
        return pack_mask(
            torch.cat(
                [unpack_mask(bits, row.shape) for bits, row in zip(packed, rows, strict=True)]
            )
        )

    def rebuild(self, name: str, expert: str) -> torch.Tensor:
        """Return a language-model tensor of one expert, in the build's dtype: θ₀ + mᵢ∘τ⋆, and the
        vocabulary rows it added.

        MMER (arXiv 2505.17110), Retention. Of a build of adapters the weights of its text tokens;
        of a plain build the merged tensor itself, of a tensor listed under `carry` the expert's.
        """
        own = self.manifest.rename(name, expert=expert)
        if self.has(own, "carried", expert):
            return self.read(own, "carried", expert).to(self.dtype)
        shared = self._combine(name, expert)
        if not self.has(name, "extra_rows", expert):
            return shared
        return torch.cat([shared, self.read(name, "extra_rows", expert).to(shared.dtype)])

    def text_weight(self, name: str) -> torch.Tensor:
        """Return a language-model tensor for text tokens, in the build's dtype: θ₀ + m̄∘τ⋆, of a
        plain build the merged one.

        Of a build of adapters θ₀ + Σ cᵢ·s·B_dᵢ A_dᵢ.
        """
        return self._combine(name, None)

    def read_adapter(self, name: str, expert: str, *, adapter: str) -> LowRank | None:
        """Return an expert's adapter in a Linear, given by the name of its weight; None where it
        has none there.
        """
        path = name.removesuffix(".weight")
        if not self.has(f"{path}.lora_A.{adapter}.weight", "adapter", expert):
            return None
        record = self.manifest.to_expert(expert).adapters
        assert record is not None
        a, b = (
            self.read(f"{path}.lora_{factor}.{adapter}.weight", "adapter", expert)
            for factor in "AB"
        )
        return LowRank(a, b, record.scale_of(name, adapter))

    def read_defaults(self, name: str, expert: str | None) -> list[LowRank]:
        """Return the default adapters of experts in a Linear; of one alone as it was tuned, else
        with the coefficients in the scales.
        """
        found = []
        for each in [expert] if expert else self.expert_names:
            record = self.manifest.to_expert(each).adapters
            default = (
                None
                if record is None
                else self.read_adapter(name, each, adapter=record.default_adapter)
            )
            if record is not None and default is not None:
                coefficient = 1.0 if expert else record.coefficient
                found.append(LowRank(default.a, default.b, default.scale * coefficient))
        return found

    def _combine(self, name: str, expert: str | None) -> torch.Tensor:
        """Return a tensor as one expert has it, or as text tokens of all of them have it."""
        if self.has(name, "merged"):
            return self.read(name, "merged")
        if not self.has(name, "delta"):
            base = self.read(name, "base")
            if self.manifest.kind == "adapters" and (defaults := self.read_defaults(name, expert)):
                return add_adapters(base, defaults, dtype=self.dtype)
            return base.to(self.dtype) if base.is_floating_point() else base
        experts = [expert] if expert else self.expert_names
        rescalers = [self.rescaler(each) for each in experts]
        formed = read_formed(
            self, self.masked_pieces(name, experts), dtype=self.dtype, factors=rescalers
        )
        if formed is not None:
            return formed.values
        masks = [self.read_packed_mask(name, each) for each in experts]
        return combine(
            self.read(name, "base"),
            self.read(name, "delta"),
            masks,
            dtype=self.dtype,
            rescalers=rescalers,
        )

    def _pieces(self, name: str, role: Role, expert: str) -> list[StoredRow]:
        rows = self._rows.get((role, expert, name))
        if not rows:
            raise ManifestError(
                f"{self.uri}: the build has no {role} tensor {name}"
                + (f" of expert {expert!r}" if expert else "")
            )
        return rows

    def _read_packed(self, row: StoredRow) -> torch.Tensor:
        out = empty_host((row.num_bytes,), torch.uint8)
        self.read_into(row, out.numpy())
        return out

    def masked_pieces(self, name: str, experts: Sequence[str] = ()) -> list[Sequence[StoredRow]]:
        """Return where the pieces of θ₀, of τ⋆ and of each expert's mask lie, of all experts if
        none are named.
        """
        masks = [self._pieces(name, "mask", expert) for expert in experts or self.expert_names]
        return [self._pieces(name, "base", ""), self._pieces(name, "delta", ""), *masks]

    def read_into(self, row: StoredRow, into: NDArray[np.uint8]) -> None:
        """Read a piece to `into`, uint8 [row.num_bytes]. Raises DamagedObject when its bytes are
        not what the manifest says.
        """
        for _ in self.read_blocks(row, block_bytes=BLOCK_BYTES, into=into):
            pass  # each block is digested while it lies in a cache

    def read_blocks(
        self, row: StoredRow, *, block_bytes: int, into: NDArray[np.uint8] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a piece in blocks, as `ReadableStore.read_blocks` does.

        Raises DamagedObject, behind the last block where the digest is not the manifest's: what was
        made of the blocks is then void.
        """
        digest = blake3()
        try:
            self._check_object(row.object)
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
                f"{self.store.uri}: {row.object} is missing; it holds {row.name}. Run the recipe"
                " again with --fresh"
            ) from error
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise DamagedObject(
                f"{Exception.__str__(error)}; {row.name} ({row.role}) is not whole. Run the recipe"
                " again with --fresh"
            ) from error
        if digest.hexdigest() != row.digest:
            raise DamagedObject(
                f"{self.store.uri}: {row.object}: {row.name} ({row.role}) is damaged. Run the"
                " recipe again with --fresh"
            )
        with self._count:
            self.bytes_read += row.num_bytes

    def _check_object(self, key: str) -> None:
        """Compare size and header of an object with manifest and table before its first tensor is
        read.
        """
        with self._count:
            if key in self._checked:
                return
            self._checked.add(
                key
            )  # other threads go on with its tensors meanwhile: whoever is told first ends the load
        try:
            entry = self._entries.get(key)
            if entry is None:
                raise ManifestError(
                    f"{self.uri}: the table names {key}, the manifest does not. The build is"
                    " damaged: run the recipe again"
                )
            damage = find_header_damage(
                self.store, entry, self._groups[key, entry.shard], method=self.manifest.method
            )
            if damage:
                raise DamagedObject(
                    f"{self.store.uri}: {damage}. Run the recipe again with --fresh"
                )
        except BaseException:
            with self._count:
                self._checked.discard(key)
            raise


def combine(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: list[torch.Tensor],
    *,
    dtype: torch.dtype,
    rescalers: Sequence[float] = (),
) -> torch.Tensor:
    """Return θ₀ + m∘τ⋆ in `dtype`, where m is the mean of the packed masks given (of one mask:
    itself).

    With `rescalers`, one per mask, m is the mean of rᵢmᵢ (EMR-Merging, arXiv 2405.17461; the mean
    over experts for text tokens is our choice). Computed in float32 and rounded once
    (docs/arithmetic.md).
    """
    factors = list(rescalers) or [1.0] * len(masks)
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if can_form(base, delta, out):
        flat = (1, base.numel())
        packed = torch.stack([pack_rows(mask, flat) for mask in masks])
        form(
            base.view(flat),
            delta.view(flat),
            packed,
            factors=factors,
            divisor=float(len(masks)),
            out=out.view(flat),
        )
        return out
    mean = torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
    for packed, factor in zip(masks, factors, strict=True):
        mask = unpack_mask(packed, delta.shape)
        mean += mask if factor == 1.0 else factor * mask.to(torch.float32)
    mean /= len(masks)
    return (base.to(torch.float32) + mean * delta.to(torch.float32)).to(dtype)
