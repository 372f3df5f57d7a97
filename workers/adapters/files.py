"""The files of an adapter folder, read like those of a checkpoint."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, StoreError
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.adapters.names import insert_adapter
from mmerge.workers.adapters.variants import refuse_variants
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.weight_files import WeightFiles, has_weight_files, read_specs

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OFFICIAL_FILES = ("mm_projector.bin", "non_lora_trainables.bin")


def is_adapter(store: ReadableStore) -> bool:
    """Return whether a folder holds adapters rather than a model."""
    if has_weight_files(store):
        return False
    return any(store.exists(file) for file in (*WEIGHT_FILES, CONFIG_FILE, *OFFICIAL_FILES))


class AdapterFiles(Checkpoint):
    """Configuration and tensors of one adapter folder."""

    def __init__(self, uri: str, *, owner: str) -> None:
        self._store: ReadableStore
        self.uri, self.owner = uri, owner
        try:
            self._store = open_readable_store(uri)
        except StoreError as error:
            raise CheckpointError(f"{owner}: {Exception.__str__(error)}") from error
        file = CONFIG_FILE if self._store.exists(CONFIG_FILE) else "config.json"
        self._config_file = file
        self.config = self._read_json(
            file, missing=f"an adapter has {CONFIG_FILE}, an official one config.json"
        )
        # Official folders may have only the model's config.json, whose `use_cache` is no variant.
        refuse_variants(
            self.config, where=f"{owner}: {uri}/{file}", is_peft_config=file == CONFIG_FILE
        )

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Configurations in subfolders, by adapter."""
        configs: dict[str, dict[str, Any]] = {}
        for file in self._subfolders:
            folder = file.split("/", 1)[0]
            name = f"{folder}/{CONFIG_FILE}"
            if self._store.exists(name):
                configs[folder] = self._read_json(name, missing="")
                refuse_variants(configs[folder], where=f"{self.owner}: {self.uri}/{name}")
        return configs

    @override
    def _weight_files(self) -> WeightFiles:
        files = [file for file in WEIGHT_FILES if self._store.exists(file)][:1]
        files += [file for file in OFFICIAL_FILES if self._store.exists(file)]
        files += self._subfolders
        if not files:
            raise CheckpointError(
                f"{self.owner}: {self.uri} has neither {' nor '.join(WEIGHT_FILES)}. Fetch the"
                " adapter again"
            )
        return dict.fromkeys(files)

    @cached_property
    def _subfolders(self) -> list[str]:
        """Weight files of adapters that PEFT saved in subfolders named after them."""
        keys = sorted(
            key
            for key in self._store.list()
            if key.count("/") == 1 and key.rsplit("/", 1)[1] in WEIGHT_FILES
        )
        chosen: dict[str, str] = {}
        for key in keys:
            folder = key.split("/", 1)[0]
            if re.fullmatch(r"checkpoint-[0-9]+", folder):
                continue  # a trainer's earlier state, no adapter of that name
            if folder not in chosen or key.endswith(".safetensors"):
                chosen[folder] = key
        return list(chosen.values())

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        """All tensors; those of subfolders have their adapter's name in theirs."""
        sources: dict[str, TensorSource] = {}
        for file in self._weight_files():
            folder = file.split("/", 1)[0] if "/" in file else ""
            where = f"{self.owner}: {self.uri}/{file}"
            for name, spec in read_specs(self._store, file, where=where).items():
                full_name = insert_adapter(name, folder) if folder else name
                sources.setdefault(full_name, TensorSource(self.uri, file, spec))
        return dict(sorted(sources.items()))
