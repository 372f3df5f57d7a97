"""Load a composite from its store onto a device."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmerge.manifests.errors import CheckpointError, ManifestError
from mmerge.manifests.manifest import FileEntry, read_file
from mmerge.workers.composite import Composite
from mmerge.workers.features import FeatureEncoder
from mmerge.workers.load_adapters import load_features, route_adapters
from mmerge.workers.media import MediaEncoder, load_tokenizer, make_config, make_model
from mmerge.workers.reader import HEAD_NAME, BuildReader
from mmerge.workers.routing import RoutedBias, RoutedLinear, Routing

Mode = Literal["expansion", "retention"]
EMBEDDING_SUFFIX = "embed_tokens.weight"


def load_composite(
    uri: str, *, mode: Mode = "expansion", expert: str | None = None, device: str = "cpu", dtype: torch.dtype | None = None
) -> Composite:
    """Return the composite at `uri`, ready for prompts.

    Args:
        uri: STORE, STORE#NAME, STORE#NAME@NUMBER or STORE#DIGEST.
        mode: `expansion` routes each token through its modality's weights; `retention` rebuilds one expert.
        expert: which one, in retention mode.
        device: where everything is loaded.
        dtype: of the loaded weights; the build's if absent.

    Raises:
        ManifestError, StoreError: the build is missing or damaged, or has no such expert.
        CheckpointError: transformers does not know the models.
    """
    reader = BuildReader(uri)
    if mode == "retention":
        if expert is None:
            raise ManifestError(f"{uri}: retention mode rebuilds one expert: name one of {', '.join(reader.expert_names)}")
        reader.manifest.to_expert(expert)
    elif expert is not None:
        raise ManifestError(f"{uri}: 'expert' has no effect in expansion mode; use mode='retention', or leave it out")
    return _Loader(reader, expert, torch.device(device), dtype or reader.dtype).load()


class _Loader:
    def __init__(self, reader: BuildReader, expert: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.reader, self.expert, self.device, self.dtype = reader, expert, device, dtype
        self.manifest = reader.manifest

    def load(self) -> Composite:
        routing = Routing()
        owner = f"expert {self.expert!r}" if self.expert else "base"
        files = self._read_files(self.manifest.to_expert(self.expert).files if self.expert else self.manifest.base.files)
        if "config.json" not in files:
            raise CheckpointError(f"{owner}: the build has no config.json of it")
        language_model = self._load_language_model(make_config(files, owner=owner), owner)
        if not self.expert and self.manifest.kind == "masks":
            self._route_linears(language_model, routing)
        if self.manifest.kind == "adapters":
            route_adapters(language_model, self.reader, routing, expert=self.expert)
        names = [self.expert] if self.expert else self.reader.expert_names
        return Composite(
            manifest=self.manifest,
            expert=self.expert,
            language_model=language_model.to(self.device),
            routing=routing,
            tokenizer=load_tokenizer(files, owner=owner),
            encoders={name: self._load_encoder(name, language_model.config.hidden_size) for name in names},
        )

    def _read_files(self, entries: tuple[FileEntry, ...]) -> dict[str, bytes]:
        return {entry.name: read_file(self.reader.store, entry) for entry in entries}

    def _load_language_model(self, config: Any, owner: str) -> Any:
        text = config.get_text_config()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
        if model_class is None:
            raise CheckpointError(f"{owner}: transformers {transformers.__version__} has no causal language model for {text.model_type!r}")
        state = {name: self._llm_weight(name).to(self.dtype) for name in self.reader.llm_names()}
        text.vocab_size = next(state[name].shape[0] for name in state if name.endswith(EMBEDDING_SUFFIX))
        text.architectures = [model_class.__name__]
        text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)))
        if self.expert and (head := self._own_head()) is not None:
            state[HEAD_NAME] = head.to(self.dtype)
        tied = text.tie_word_embeddings
        return make_model(text, state, dtype=self.dtype, owner=owner, may_lack=lambda key: tied and key == HEAD_NAME)

    def _llm_weight(self, name: str) -> torch.Tensor:
        return self.reader.rebuild(name, self.expert) if self.expert else self.reader.text_weight(name)

    def _own_head(self) -> torch.Tensor | None:
        """Return the head of an expert whose base is tied and has none, if the expert has one."""
        assert self.expert is not None
        own = self.manifest.rename(HEAD_NAME, expert=self.expert)
        if HEAD_NAME in self.reader.llm_names() or not self.reader.has(own, "carried", self.expert):
            return None
        return self.reader.read(own, "carried", self.expert)

    def _route_linears(self, model: nn.Module, routing: Routing) -> None:
        """Put a RoutedLinear in place of every Linear of the layers whose weight or bias was merged with masks."""
        for path, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear) or ".layers." not in f".{path}" or not self.reader.has(f"{path}.weight", "delta"):
                continue
            names = self.reader.expert_names
            bias = None
            if module.bias is not None:
                experts = [self.reader.rebuild(f"{path}.bias", name).to(self.dtype) for name in names]
                bias = RoutedBias(self.reader.text_weight(f"{path}.bias").to(self.dtype), experts)
            routed = RoutedLinear(
                routing,
                base=self.reader.read(f"{path}.weight", "base"),
                delta=self.reader.read(f"{path}.weight", "delta"),
                masks=[self.reader.read_packed_mask(f"{path}.weight", name) for name in names],
                dtype=self.dtype,
                bias=bias,
                rescalers=[self.reader.rescaler(name) for name in names],
            )
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, routed)

    def _load_encoder(self, name: str, hidden_size: int) -> MediaEncoder | FeatureEncoder:
        record = self.manifest.to_expert(name)
        files = self._read_files(record.files)
        if self._has_no_encoder(files, name):
            return load_features(self.reader, name, hidden_size=hidden_size, dtype=self.dtype, device=self.device)
        state = {key: self.reader.read(key, "carried", name) for key in self.reader.encoder_names(name)}
        embedding = next(key for key in self.reader.llm_names() if key.endswith(EMBEDDING_SUFFIX))
        return MediaEncoder(
            expert=name,
            modality=record.modality,
            files=files,
            state=state,
            embedding=(self.manifest.rename(embedding, expert=name), self.reader.rebuild(embedding, name)),
            placeholder=record.placeholder,
            dtype=self.dtype,
            device=self.device,
        )

    def _has_no_encoder(self, files: dict[str, bytes], name: str) -> bool:
        """Return whether an expert's files describe a language model alone: it takes features, or nothing but text."""
        config = make_config(files, owner=f"expert {name!r}")
        return config.get_text_config() is config
