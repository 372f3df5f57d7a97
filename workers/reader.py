"""Tensors of a build by name: the byte ranges that the table names, with their digests checked."""

from __future__ import annotations

from collections import defaultdict

import torch

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.entry import Role
from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.manifest import Manifest, read_manifest
from mmerge.manifests.reference import open_build
from mmerge.manifests.store import Store
from mmerge.manifests.table import StoredRow, read_table
from mmerge.workers.dtypes import TORCH_DTYPES, to_tensor
from mmerge.workers.masks import pack_mask, unpack_mask

HEAD_NAME = "lm_head.weight"


class BuildReader:
    """One build: its manifest, and its tensors read on demand. `bytes_read` counts what was fetched."""

    def __init__(self, uri: str) -> None:
        """Open the build at `uri`. Raises StoreError, ManifestError."""
        self.uri = uri
        self.store: Store
        self.store, build = open_build(uri)
        self.manifest: Manifest = read_manifest(self.store, build)
        self.bytes_read = 0
        self._rows: dict[tuple[str, str, str], list[StoredRow]] = defaultdict(list)
        for row in read_table(self.store, self.manifest.table):
            self._rows[(row.role, row.expert, row.name)].append(row)
        for rows in self._rows.values():
            rows.sort(key=lambda row: row.row_start)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the build was written, and in which rebuilt weights are given."""
        return TORCH_DTYPES[self.manifest.dtype]

    @property
    def expert_names(self) -> list[str]:
        """The experts in recipe order; a modality id is a position in this list."""
        return [expert.name for expert in self.manifest.experts]

    def names(self, role: Role, expert: str = "") -> list[str]:
        """Return the names of all tensors of a role, sorted."""
        return sorted(name for found, owner, name in self._rows if found == role and owner == expert)

    def llm_names(self) -> list[str]:
        """Return the names of all language-model tensors, sorted."""
        return sorted({*self.names("base"), *self.names("merged")})

    def encoder_names(self, expert: str) -> list[str]:
        """Return the names in an expert's files of its encoder and connector: all carried tensors but those of its language model."""
        language_model = {self.manifest.rename(name, expert=expert) for name in [*self.llm_names(), HEAD_NAME]}
        return [name for name in self.names("carried", expert) if name not in language_model]

    def has(self, name: str, role: Role, expert: str = "") -> bool:
        """Return whether there is such a tensor."""
        return (role, expert, name) in self._rows

    def num_rows(self, name: str, role: Role, expert: str = "") -> int:
        """Return the first dimension of a tensor."""
        return self._pieces(name, role, expert)[-1].row_stop

    def read(self, name: str, role: Role, expert: str = "") -> torch.Tensor:
        """Return one stored tensor. Raises DamagedObject when its bytes are not what the manifest says."""
        pieces = [to_tensor(self._read_piece(row), row.dtype).reshape(row.shape) for row in self._pieces(name, role, expert)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read_packed_mask(self, name: str, expert: str) -> torch.Tensor:
        """Return an expert's mask of one tensor, packed (uint8, see workers/masks.py)."""
        rows = self._pieces(name, "mask", expert)
        packed = [to_tensor(self._read_piece(row), "U8") for row in rows]
        if len(rows) == 1:
            return packed[0]
        return pack_mask(torch.cat([unpack_mask(bits, row.shape) for bits, row in zip(packed, rows, strict=True)]))

    def rebuild(self, name: str, expert: str) -> torch.Tensor:
        """Return a language-model tensor of one expert, in the build's dtype: θ₀ + mᵢ∘τ⋆, and the vocabulary rows it added.

        MMER (arXiv 2505.17110), Retention; of a plain build the merged tensor itself, of a tensor listed under `carry` the expert's.
        """
        own = self.manifest.rename(name, expert=expert)
        if self.has(own, "carried", expert):
            return self.read(own, "carried", expert).to(self.dtype)
        shared = self._combine(name, [expert])
        if not self.has(name, "extra_rows", expert):
            return shared
        return torch.cat([shared, self.read(name, "extra_rows", expert).to(shared.dtype)])

    def text_weight(self, name: str) -> torch.Tensor:
        """Return a language-model tensor for text tokens, in the build's dtype: θ₀ + m̄∘τ⋆, of a plain build the merged one."""
        return self._combine(name, self.expert_names)

    def _combine(self, name: str, experts: list[str]) -> torch.Tensor:
        if self.has(name, "merged"):
            return self.read(name, "merged")
        base = self.read(name, "base")
        if not self.has(name, "delta"):
            return base.to(self.dtype) if base.is_floating_point() else base
        masks = [self.read_packed_mask(name, expert) for expert in experts]
        return combine(base, self.read(name, "delta"), masks, dtype=self.dtype)

    def _pieces(self, name: str, role: Role, expert: str) -> list[StoredRow]:
        rows = self._rows.get((role, expert, name))
        if not rows:
            raise ManifestError(f"{self.uri}: the build has no {role} tensor {name}" + (f" of expert {expert!r}" if expert else ""))
        return rows

    def _read_piece(self, row: StoredRow) -> memoryview:
        try:
            data = self.store.read_range(row.object, offset=row.offset, num_bytes=row.num_bytes)
        except NotFound as error:
            raise DamagedObject(
                f"{self.store.uri}: {row.object} is missing; it holds {row.name}. Run the recipe again with --fresh"
            ) from error
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise DamagedObject(
                f"{Exception.__str__(error)}; {row.name} ({row.role}) is not whole. Run the recipe again with --fresh"
            ) from error
        if digest_bytes(data) != row.digest:
            raise DamagedObject(f"{self.store.uri}: {row.object}: {row.name} ({row.role}) is damaged. Run the recipe again with --fresh")
        self.bytes_read += row.num_bytes
        return data


def combine(base: torch.Tensor, delta: torch.Tensor, masks: list[torch.Tensor], *, dtype: torch.dtype) -> torch.Tensor:
    """Return θ₀ + m∘τ⋆ in `dtype`, where m is the mean of the packed masks given (of one mask: itself).

    Computed in float32 and rounded once (METHODS.md sections 2 and 6).
    """
    mean = unpack_mask(masks[0], delta.shape).to(torch.float32)
    for packed in masks[1:]:
        mean += unpack_mask(packed, delta.shape)
    mean /= len(masks)
    return (base.to(torch.float32) + mean * delta.to(torch.float32)).to(dtype)
