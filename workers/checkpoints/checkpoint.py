"""Hugging Face checkpoints: their configuration, small files and tensors."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError, NotFound, StoreError
from mmerge.manifests.stores.open import is_unicode, open_readable_store
from mmerge.workers.checkpoints.quantization import (
    dequantise,
    has_quantization,
    without_quantization,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tied_head import drop_tied_head
from mmerge.workers.checkpoints.weight_files import (
    WeightFiles,
    find_weight_files,
    read_tensors,
    refuse_gguf,
)
from mmerge.workers.families.interface import Family
from mmerge.workers.families.registry import find_family, parse_config, text_config_of

SMALL_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of the files copied with a model: configuration, tokenizer, processor, templates.

Code is never copied.
"""


class Checkpoint:
    """One checkpoint folder: its configuration, small files and tensors."""

    _config_file = "config.json"

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
                refuse_gguf(self._store, where=f"{owner}: {uri}")
            raise
        for part in (self.config, self.text_config):
            model_type = part.get("model_type")
            if model_type is not None and not isinstance(model_type, str):
                raise CheckpointError(
                    f"{owner}: {uri}/config.json: model_type {model_type!r} is no text."
                    " Fetch the checkpoint again"
                )

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors by their stored name. Raises CheckpointError.

        Only headers are read, and head and embedding where both are stored although they are tied.
        """
        sources = read_tensors(self._store, self._weight_files(), uri=self.uri, owner=self.owner)
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
    def parts(self) -> tuple[Checkpoint, ...]:
        """The checkpoints in folders that its tensors are read from: itself."""
        return (self,)

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
            CheckpointError: one of them cannot be read, they exceed the limits, or the
                configuration is no longer that by which the build was planned.
        """
        names = [
            name
            for name in self._store.list()
            if "/" not in name and name.endswith(SMALL_FILE_SUFFIXES)
        ]
        files = {}
        total_bytes = 0
        where = f"{self.owner}: {self.uri}"
        limits.SMALL_FILES.check(len(names), where=where, error=CheckpointError)
        for name in sorted(names):
            if name.endswith(".index.json"):
                continue
            if not is_unicode(name):
                raise CheckpointError(f"{where}: the file name {name!r} is not UTF-8. Rename it")
            num_bytes = self._store.num_bytes(name)
            limits.SMALL_FILE_BYTES.check(num_bytes, where=f"{where}/{name}", error=CheckpointError)
            total_bytes += num_bytes
            limits.SMALL_FILES_BYTES.check(total_bytes, where=where, error=CheckpointError)
            try:
                files[name] = self._store.read(name)
            except StoreError as error:
                raise CheckpointError(f"{self.owner}: {Exception.__str__(error)}") from error
        self._check_config(files.get(self._config_file))
        if "config.json" in files and has_quantization(self.config):
            # Weights are dequantised when they are read, so all outputs are plain.
            plain = without_quantization(self.config)
            files["config.json"] = json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"
        return files

    def read_small_file(self, name: str) -> bytes | None:
        """Return one of the small files, None if there is none. Raises CheckpointError."""
        try:
            return self._store.read(name, max_bytes=limits.SMALL_FILE_BYTES.value)
        except NotFound:
            return None
        except StoreError as error:
            raise CheckpointError(f"{self.owner}: {Exception.__str__(error)}") from error

    def _check_config(self, data: bytes | None) -> None:
        """Raise CheckpointError if the configuration file no longer says what was read of it."""
        where = f"{self.owner}: {self.uri}/{self._config_file}"
        try:
            is_equal = data is not None and parse_config(data, where=where) == self.config
        except ValueError:
            is_equal = False
        if not is_equal:
            raise CheckpointError(f"{where}: was changed since the build was planned. Run again")

    def _weight_files(self) -> WeightFiles:
        return find_weight_files(
            self._store,
            read_json=lambda name: self._read_json(name, missing=""),
            where=f"{self.owner}: {self.uri}",
        )

    def _read_json(self, name: str, *, missing: str) -> dict[str, Any]:
        where = f"{self.owner}: {self.uri}/{name}"
        try:
            value = parse_json(
                self._store.read(name, max_bytes=limits.SMALL_FILE_BYTES.value),
                what=where,
                max_bytes=limits.SMALL_FILE_BYTES.value,
                allow_infinity=True,
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
