"""Read a build as a plain language model, also where its base is a multimodal model."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from typing_extensions import override

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.entry import Role
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.workers.families.name_map import map_language_model
from mmerge.workers.families.registry import is_multimodal_config, parse_config
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

_ADAPTER = ".lora_"


class LanguageReader(BuildReader):
    """A build whose language-model tensors have the names of the plain language model's class.

    Of a plain base those are the stored names. A multimodal base holds its language model under
    other names, beside its own encoder and connector, which are merged with those of the experts.
    """

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The base's config.json; empty where the build has none. Raises CheckpointError."""
        return self._read_config(self.manifest.base.files, owner="base")

    @cached_property
    def is_multimodal(self) -> bool:
        """Whether the base is a multimodal model."""
        return is_multimodal_config(self.base_config)

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Stored names of the language model in a multimodal base, by plain name."""
        if not self.is_multimodal:
            return {}
        try:
            return map_language_model(self.base_config, self.base_names())
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.uri}: the language model in the base is not found:"
                f" {Exception.__str__(error)}. Write an ordinary checkpoint with 'mmerge export'"
                " and load it with transformers"
            ) from error

    @override
    def stored_name(self, name: str, role: Role | None = None) -> str:
        if role == "carried" or not self.is_multimodal:
            return name
        if role == "adapter":
            linear, mark, factor = name.rpartition(_ADAPTER)
            weight = f"{linear}.weight"
            return self.stored_name(weight).removesuffix(".weight") + mark + factor
        return self._stored_names.get(name, name)

    @override
    def llm_names(self) -> list[str]:
        return sorted(self._stored_names) if self.is_multimodal else super().llm_names()

    def outer_names(self) -> list[str]:
        """Return the base's tensors outside its language model: its encoder and connector."""
        inner = set(self._stored_names.values())
        return [name for name in self.base_names() if name not in inner] if inner else []

    def encoder_files(self, expert: str) -> tuple[FileEntry, ...]:
        """Return the files that an expert's encoder is made from: its own, or the base's."""
        is_borrowed = self._find_encoder_owner(expert) == "base"
        return (self.manifest.base if is_borrowed else self.manifest.to_expert(expert)).files

    def encoder_name(self, name: str, *, expert: str) -> str:
        """Return the name that one of the base's tensors has beside `encoder_files`."""
        if self._find_encoder_owner(expert) == "base":
            return self.stored_name(name)
        return self.expert_name(name, expert=expert)

    def read_encoder(self, expert: str, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return an expert's encoder and connector, named as beside its `encoder_files`."""
        state = {key: self.read(key, "carried", expert) for key in self.encoder_names(expert)}
        if self._find_encoder_owner(expert) != "expert":
            for name in self.outer_names():
                key = self.encoder_name(name, expert=expert)
                state[key] = rebuild_weight(self, name, expert=expert, dtype=dtype)
        return state

    def _find_encoder_owner(self, expert: str) -> Literal["expert", "base", "both"]:
        """Return whose encoder and connector encode an expert's inputs.

        Those of an expert of the base's class are merged with the base's. A plain language model
        has none, so the base's encode for it. An expert of another class has its own.
        """
        record = self.manifest.to_expert(expert)
        if not self.is_multimodal or record.modality == "text":
            return "expert"
        config = self._read_config(record.files, owner=f"expert {expert!r}")
        if not is_multimodal_config(config):
            return "base"
        is_equal = config.get("model_type") == self.base_config.get("model_type")
        return "both" if is_equal else "expert"

    def read_base_encoder(self, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return encoder and connector of a multimodal base, for inputs that no expert reads."""
        return {name: text_weight(self, name, dtype=dtype) for name in self.outer_names()}

    def encoder_bytes(self, expert: str) -> int:
        """Return the stored bytes from which an expert's encoder is made."""
        copied = self.names("carried", expert)
        total = sum(self.stored_bytes(key, "carried", expert) for key in copied)
        if self._find_encoder_owner(expert) != "expert":
            for name in self.outer_names():
                total += self.stored_bytes(name, "merged") + self.stored_bytes(name, "base")
                total += self.stored_bytes(name, "delta") + self.stored_bytes(name, "mask", expert)
        return total

    def _read_config(self, files: tuple[FileEntry, ...], *, owner: str) -> dict[str, Any]:
        entry = next((file for file in files if file.name == "config.json"), None)
        if entry is None:
            return {}
        try:
            return parse_config(read_file(self.store, entry), where=f"{owner}: config.json")
        except ValueError as error:
            raise CheckpointError(f"{error}. Fetch the checkpoint again") from error
