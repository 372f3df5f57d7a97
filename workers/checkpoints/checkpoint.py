"""Hugging Face checkpoints read as names and byte ranges: only headers until a task asks for bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmerge.manifests.digest import digest_json, parse_json
from mmerge.manifests.errors import CheckpointError, NotFound, StoreError
from mmerge.manifests.format.safetensors_header import TensorSpec, header_length, parse_header
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import open_readable_store, prefetch_bytes
from mmerge.workers.families.interface import Family
from mmerge.workers.families.registry import find_family, text_config_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the files that travel with a model: configuration, tokenizer, processor, templates.
Code does not.
"""
MAX_SMALL_FILE_BYTES = 64 << 20
_FIRST_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class TensorSource:
    """Where the bytes of one tensor lie: checkpoint, file, offset. Pure data; tasks carry it."""

    uri: str
    file: str
    spec: TensorSpec

    def to_rows(self, row_start: int, row_stop: int) -> TensorSource:
        """Return the source of some of the tensor's rows (its first dimension); a scalar counts as
        one row.
        """
        shape = self.spec.shape or (1,)
        row_bytes = self.spec.num_bytes // shape[0] if shape[0] else 0
        spec = TensorSpec(
            name=self.spec.name,
            dtype=self.spec.dtype,
            shape=(row_stop - row_start, *shape[1:]),
            offset=self.spec.offset + row_start * row_bytes,
            num_bytes=(row_stop - row_start) * row_bytes,
        )
        return TensorSource(self.uri, self.file, spec)


@dataclass(frozen=True)
class LowRankSource(TensorSource):
    """The weights that a LoRA adapter makes of a Linear: θ₀ + scale·B·A, float32, formed where a
    task reads them.

    `uri` and `file` are the adapter's; `spec` describes the rows formed, as if they lay in a file
    as float32.
    """

    base: TensorSource
    """The same rows of the base's weights."""
    a: TensorSource
    """[rank, in]."""
    b: TensorSource
    """[out, rank], all rows of the matrix."""
    scale: float
    first_row: int = 0
    """Which row of the matrix the first one here is."""

    def to_rows(self, row_start: int, row_stop: int) -> LowRankSource:
        """Return the source of some of the rows."""
        return LowRankSource(
            uri=self.uri,
            file=self.file,
            spec=TensorSource.to_rows(self, row_start, row_stop).spec,
            base=self.base.to_rows(row_start, row_stop),
            a=self.a,
            b=self.b,
            scale=self.scale,
            first_row=self.first_row + row_start,
        )

    @property
    def factor_bytes(self) -> int:
        """Bytes of both factors as read and widened to float32: what a task holds of them."""
        return sum(
            factor.spec.num_bytes + 4 * factor.spec.num_entries for factor in (self.a, self.b)
        )


class OpenStores(dict[str, ReadableStore]):
    """Checkpoints that a task has opened, and the adapter factors that it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: dict[TensorSource, Any] = {}


class Checkpoint:
    """One checkpoint folder: its configuration and the headers of its safetensors files."""

    def __init__(self, uri: str, *, owner: str) -> None:
        """Open the folder at `uri`; `owner` ("base", "expert 'image'") begins every error.

        Raises:
            CheckpointError: the folder or its config.json is missing or unreadable.
        """
        self.uri = uri
        self.owner = owner
        try:
            self._store = open_readable_store(uri)
        except NotFound as error:
            raise CheckpointError(
                f"{owner}: {uri}: no such folder. Check the path in the recipe (relative paths"
                " start at the recipe's folder)"
            ) from error
        except StoreError as error:
            raise CheckpointError(f"{owner}: {Exception.__str__(error)}") from error
        self.config = self._read_json("config.json", missing="a Hugging Face checkpoint has one")

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by their name in the files. Only headers are read. Raises CheckpointError."""
        found: dict[str, TensorSource] = {}
        for file, names in self._weight_files().items():
            specs = self._read_header(file)
            missing = sorted(set(names or specs) - set(specs))
            if missing:
                raise CheckpointError(
                    f"{self.owner}: {self.uri}/{file} lacks {missing[0]}, which the index places"
                    " there. Fetch the checkpoint again"
                )
            found |= {name: TensorSource(self.uri, file, specs[name]) for name in names or specs}
        return dict(sorted(found.items()))

    @property
    def identity(self) -> dict[str, str]:
        """For each weight file a text that changes when the file is replaced (size, entity tag,
        time of change). Asked anew each time: a plan may be run again later.
        """
        return {file: self._store.identity(file) for file in self._weight_files()}

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        return text_config_of(self.config)

    @cached_property
    def family(self) -> Family:
        """The family of the language model, told from names and shapes. Raises CheckpointError."""
        shapes = {name: source.spec.shape for name, source in self.tensors.items()}
        return find_family(shapes, self.text_config, where=f"{self.owner}: {self.uri}")

    def is_tied(self) -> bool:
        """Return whether the head shares its weights with the embedding, as the configuration says."""
        return bool(
            self.config.get(
                "tie_word_embeddings", self.text_config.get("tie_word_embeddings", False)
            )
        )

    def read_small_files(self) -> dict[str, bytes]:
        """Return the configuration, tokenizer and processor files by name.

        Raises:
            CheckpointError: one of them is larger than 64 MiB.
        """
        names = [
            name
            for name in self._store.list()
            if "/" not in name and name.endswith(SMALL_FILE_SUFFIXES)
        ]
        files = {}
        for name in sorted(names):
            if name.endswith(".index.json"):
                continue
            num_bytes = self._store.num_bytes(name)
            if num_bytes > MAX_SMALL_FILE_BYTES:
                raise CheckpointError(
                    f"{self.owner}: {self.uri}/{name} has {num_bytes:,} bytes; files beside the"
                    f" weights are copied up to {MAX_SMALL_FILE_BYTES:,}. Move it elsewhere"
                )
            files[name] = self._store.read(name)
        return files

    def _weight_files(self) -> dict[str, list[str] | None]:
        """Return each weight file with the tensors that the index places there (None: all that it
        has).
        """
        if self._store.exists(INDEX_FILE):
            index = self._read_json(INDEX_FILE, missing="")
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise CheckpointError(
                    f"{self.owner}: {self.uri}/{INDEX_FILE} has no weight_map. Fetch the checkpoint"
                    " again"
                )
            files: dict[str, list[str] | None] = {}
            for name, file in sorted(weight_map.items()):
                if "/" in file or "\\" in file or file in ("", ".", ".."):
                    raise CheckpointError(
                        f"{self.owner}: {INDEX_FILE} places {name} in {file!r}; only files of the"
                        " same folder are read"
                    )
                names = files.setdefault(file, [])
                assert names is not None
                names.append(name)
            return files
        if self._store.exists(SINGLE_FILE):
            return {SINGLE_FILE: None}
        raise CheckpointError(
            f"{self.owner}: {self.uri} has neither {SINGLE_FILE} nor {INDEX_FILE}. "
            "Only safetensors are read: save the model with safe_serialization=True"
        )

    def _read_header(self, file: str) -> dict[str, TensorSpec]:
        where = f"{self.owner}: {self.uri}/{file}"
        try:
            file_bytes = self._store.num_bytes(file)
            prefix = self._store.read_range(
                file, offset=0, num_bytes=min(_FIRST_READ_BYTES, file_bytes)
            )
            needed = 8 + header_length(prefix[:8], file_bytes=file_bytes, where=where)
            if needed > len(prefix):
                prefix = self._store.read_range(file, offset=0, num_bytes=needed)
        except NotFound as error:
            raise CheckpointError(
                f"{where}: no such file, though the index names it. Fetch the checkpoint again"
            ) from error
        except StoreError as error:
            raise CheckpointError(f"{self.owner}: {Exception.__str__(error)}") from error
        return parse_header(prefix, file_bytes=file_bytes, where=where)

    def _read_json(self, name: str, *, missing: str) -> dict[str, Any]:
        where = f"{self.owner}: {self.uri}/{name}"
        try:
            value = parse_json(
                self._store.read(name, max_bytes=MAX_SMALL_FILE_BYTES),
                what=where,
                max_bytes=MAX_SMALL_FILE_BYTES,
            )
        except NotFound as error:
            raise CheckpointError(f"{where}: no such file; {missing}") from error
        except StoreError as error:
            raise CheckpointError(f"{self.owner}: {Exception.__str__(error)}") from error
        except ValueError as error:
            raise CheckpointError(f"{error}. Fetch the checkpoint again") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: is no JSON object. Fetch the checkpoint again")
        return value


def identity_digest(identities: dict[str, dict[str, str]], source: TensorSource) -> str:
    """Return the digest of a tensor's place in files of these identities (by URI and file): equal
    while none is replaced.
    """
    if isinstance(source, LowRankSource):
        parts = [identity_digest(identities, part) for part in (source.base, source.a, source.b)]
        return digest_json([*parts, source.scale.hex(), source.first_row])
    identity = identities[source.uri]
    return digest_json(
        [source.uri, source.file, identity[source.file], source.spec.offset, source.spec.num_bytes]
    )


def ahead_bytes(sources: Sequence[TensorSource]) -> int:
    """Return the most that is held in memory to read these tensors ahead of a task: something only
    for what lies behind a network.
    """
    return sum(prefetch_bytes(uri) for uri in {source.uri for source in sources})


def read_source(
    source: TensorSource, *, stores: dict[str, ReadableStore], offset: int, num_bytes: int
) -> memoryview:
    """Return `num_bytes` bytes of a tensor, `offset` bytes from its start. `stores` keeps opened
    checkpoints.
    """
    if isinstance(source, LowRankSource):
        from mmerge.workers.checkpoints.lora_weights import read_low_rank

        return read_low_rank(source, stores, start=offset // 4, stop=(offset + num_bytes) // 4)
    store = stores.get(source.uri)
    if store is None:
        store = stores[source.uri] = open_readable_store(source.uri)
    begin = source.spec.offset
    return store.read_forward(
        source.file,
        offset=begin + offset,
        num_bytes=num_bytes,
        start=begin,
        stop=begin + source.spec.num_bytes,
    )
