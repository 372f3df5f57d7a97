"""Hugging Face checkpoints: their configuration and the headers of their weight files."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError, NotFound, StoreError
from mmerge.manifests.format.safetensors_header import TensorSpec, header_length, parse_header
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.quantization import (
    dequantise,
    has_quantization,
    without_quantization,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tied_head import drop_tied_head
from mmerge.workers.families.interface import Family
from mmerge.workers.families.registry import find_family, text_config_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of the files copied with a model: configuration, tokenizer, processor, templates.

Code is never copied.
"""
MAX_SMALL_FILE_BYTES = 64 << 20
_FIRST_READ_BYTES = 1 << 16


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
        try:
            self.config = self._read_json(
                "config.json", missing="a Hugging Face checkpoint has one"
            )
        except CheckpointError as error:
            if isinstance(error.__cause__, NotFound):
                self._refuse_gguf()
            raise

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by their stored name. Raises CheckpointError.

        Only headers are read, and head and embedding where both are stored although they are tied.
        """
        sources: dict[str, TensorSource] = {}
        for file, names in self._weight_files().items():
            specs = self._read_header(file)
            missing = sorted(set(names or specs) - set(specs))
            if missing:
                raise CheckpointError(
                    f"{self.owner}: {self.uri}/{file} lacks {missing[0]}, which the index places"
                    " there. Fetch the checkpoint again"
                )
            for name in names or specs:
                sources[name] = TensorSource(self.uri, file, specs[name])
        where = f"{self.owner}: {self.uri}"
        weights = dequantise(sources, self.config, where=where)
        return dict(sorted(drop_tied_head(weights, self.config, where=where).items()))

    @property
    def identity(self) -> dict[str, str]:
        """By weight file, a text that changes when the file is replaced.

        It is read from the store at every access, because a plan may be run again later.
        """
        return {file: self._store.identity(file) for file in self._weight_files()}

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        return text_config_of(self.config)

    @cached_property
    def family(self) -> Family:
        """The family of the language model, from names and shapes. Raises CheckpointError."""
        shapes = {name: source.spec.shape for name, source in self.tensors.items()}
        return find_family(shapes, self.text_config, where=f"{self.owner}: {self.uri}")

    @cached_property
    def language_prefix(self) -> str:
        """The prefix of the language model's tensors, that of the first embedding."""
        return self.family.find_prefixes(self.tensors)[0]

    def is_tied(self) -> bool:
        """Return whether the configuration ties the head to the embedding."""
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
        if "config.json" in files and has_quantization(self.config):
            # Weights are dequantised when they are read, so all outputs are plain.
            plain = without_quantization(self.config)
            files["config.json"] = json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"
        return files

    def _weight_files(self) -> dict[str, list[str] | None]:
        """Return the tensors that the index places in each weight file; None for all of a file."""
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
                        f"{self.owner}: {INDEX_FILE} places {name} in {file!r}; only files in"
                        " the same folder are read"
                    )
                names = files.setdefault(file, [])
                assert names is not None
                names.append(name)
            return files
        if self._store.exists(SINGLE_FILE):
            return {SINGLE_FILE: None}
        self._refuse_gguf()
        raise CheckpointError(
            f"{self.owner}: {self.uri} has neither {SINGLE_FILE} nor {INDEX_FILE}. "
            "Only safetensors are read: save the model with safe_serialization=True"
        )

    def _refuse_gguf(self) -> None:
        """Raise CheckpointError if the folder holds GGUF files."""
        file = next((name for name in self._store.list() if name.endswith(".gguf")), None)
        if file is not None:
            raise CheckpointError(
                f"{self.owner}: {self.uri} holds its weights as GGUF ({file}), which is not read."
                " Give the checkpoint from which it was converted, or convert it back"
                " (transformers: from_pretrained with gguf_file, save_pretrained)"
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
