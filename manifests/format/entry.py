"""Entries: the record of one stored object and the tensors in it; a manifest lists them."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmerge.manifests.digest import SHOWN_DIGITS, digest_json, parse_json, to_canonical_json
from mmerge.manifests.errors import (
    REPAIR,
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from mmerge.manifests.stores.base import ReadableStore, Store, check_key

Role = Literal["base", "delta", "mask", "merged", "carried", "extra_rows", "adapter"]
"""Contents of a stored tensor, in this order: base weights, τ⋆, one packed modality mask, a merged
plain tensor, a tensor copied from an expert, the vocabulary rows that an expert added, a LoRA
factor of an expert's adapter.
"""

log = logging.getLogger("mmerge.store")
MAX_ENTRY_BYTES = 64 << 20
DIGEST_PATTERN = r"^[0-9a-f]{64}$"


def validate_key(key: str) -> str:
    """Return `key` if it cannot leave its store, for pydantic validators. Raises ValueError."""
    try:
        return check_key(key)
    except StoreError as error:
        raise ValueError(Exception.__str__(error)) from error


class Record(BaseModel):
    """A frozen part of a manifest; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def to_checked_json(record: Record) -> bytes:
    """Return the stored form of a record: canonical JSON with a digest of all other fields.

    The record has a field `checksum`. A record that is not covered by the digest of another one
    would hide a changed digit.
    """
    raw = record.model_dump(mode="json", exclude_none=True, exclude={"checksum"})
    return to_canonical_json(raw | {"checksum": digest_json(raw)})


def check_checksum(raw: Any) -> None:
    """Compare the `checksum` of a parsed record with its other fields; older records have none.

    Raises:
        ValueError: they differ.
    """
    if not isinstance(raw, dict) or "checksum" not in raw:
        return
    digest = digest_json({name: value for name, value in raw.items() if name != "checksum"})
    if raw["checksum"] != digest:
        raise ValueError(
            f"its checksum is {str(raw['checksum'])[:SHOWN_DIGITS]!r}, its content gives"
            f" {digest[:SHOWN_DIGITS]!r}"
        )


class TensorStatistics(Record):
    """Counts and norms of one piece of a tensor; a share is a count / `num_entries`.

    A mask row has the fields of its expert, a delta or merged row those of the sign election.
    """

    num_entries: int
    num_kept: int | None = None
    """Entries of this expert that are not zero after trimming."""
    num_agreeing: int | None = None
    """Kept entries whose sign is the elected one."""
    num_masked: int | None = None
    """Entries of this expert's mask that are 1."""
    task_vector_norm: float | None = None
    """‖τᵢ‖₂ before trimming."""
    delta_norm: float | None = None
    """‖τ⋆‖₂ as stored."""
    consensus: tuple[int, ...] | None = None
    """Number of entries kept by the masks of exactly 0, 1, …, n experts (docs/arithmetic.md)."""
    overlaps: tuple[int, ...] | None = None
    """Entries in the masks of both experts of the pairs (0,1), (0,2), …, (1,2), …, in recipe order.
    """


class TensorRow(Record):
    """One tensor, or a piece of its rows, in one object; `offset` is in bytes of that object."""

    name: str
    role: Role
    expert: str = ""
    dtype: str
    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    offset: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    digest: str = Field(pattern=DIGEST_PATTERN)
    statistics: TensorStatistics | None = None


class ObjectEntry(Record):
    """One stored object as a manifest lists it: key, size, and digest of its content."""

    key: str
    shard: str
    role: Literal["base", "merge", "carry"]
    expert: str = ""
    num_bytes: int = Field(ge=0)
    digest: str = Field(pattern=DIGEST_PATTERN)
    inputs: dict[str, str] | None = None
    """Provenance of a merged object: short digests of its inputs, used to explain a rebuild.

    The keys are `base`, `expert:NAME` of each expert, `numbers` (the recipe's hyper-parameters) and
    `thresholds`. Objects are not found by them.
    """

    @field_validator("key")
    @classmethod
    def _stays_inside(cls, key: str) -> str:
        return validate_key(key)


class ShardEntry(Record):
    """The result of one finished task: its object and tensors; the bytes stay in the store."""

    object: ObjectEntry
    tensors: tuple[TensorRow, ...]
    checksum: str | None = None
    """Digest of the other fields as they are stored; None in entries of version 0.1 and earlier."""


def object_key(digest: str) -> str:
    """Return the key of the object whose inputs and hyper-parameters have this digest."""
    return f"objects/{digest}.safetensors"


def digest_of_object(key: str) -> str:
    """Return the DIGEST of the key of an object, the inverse of `object_key`."""
    return key.removeprefix("objects/").removesuffix(".safetensors")


def entry_key(digest: str) -> str:
    """Return the key of the entry of an object; the object is complete once its entry exists."""
    return f"objects/{digest}.json"


def read_entry(store: ReadableStore, digest: str) -> ShardEntry | None:
    """Return the entry of a finished shard, None if no task has finished it.

    Raises:
        ManifestError: the entry is damaged.
    """
    key = entry_key(digest)
    try:
        raw = store.read(key, max_bytes=MAX_ENTRY_BYTES)
        value = parse_json(raw, what=key)
        check_checksum(value)
        entry = ShardEntry.model_validate(value)
        if entry.object.key != object_key(digest):
            raise ValueError(f"it describes {entry.object.key}")
    except NotFound:
        return None
    except StoreUnavailable:
        raise
    except (StoreError, ValueError) as error:
        # A pydantic error has no text of its own, a StoreError one without the name of its class.
        text = Exception.__str__(error) or str(error)
        reason = text.splitlines()[0]
        raise ManifestError(f"{store.uri}: {key} is damaged ({reason}). {REPAIR}") from error
    return entry


def find_entry(store: ReadableStore, digest: str) -> ShardEntry | None:
    """Return the entry of a finished shard, None if it is missing, or damaged (logged)."""
    try:
        return read_entry(store, digest)
    except ManifestError as error:
        log.warning("%s", Exception.__str__(error))
        return None


def write_entry(store: Store, digest: str, entry: ShardEntry) -> None:
    """Record that an object is complete. Written after the object, never before."""
    store.put(entry_key(digest), to_checked_json(entry))
