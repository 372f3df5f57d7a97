"""A mergekit YAML: its keys, its models or slices, and the modules of multimodal models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.mergekit_models import (
    Model,
    Slice,
    check_entry,
    parse_model,
    parse_models,
    parse_slices,
    refuse,
    to_mapping,
    to_uri,
)
from mmerge.workers.checkpoints.checkpoint import Checkpoint

log = logging.getLogger("mmerge.recipe")

KNOWN_KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
LANGUAGE_MODULES = ("text_decoder", "default", "language_model")
"""Names of the module that is the language model."""
MOE_REFUSAL = (
    "this is a file of mergekit-moe, which makes a mixture of experts with new routers; nothing"
    " here does. Run it with mergekit-moe: its output is a checkpoint that can be merged"
)


@dataclass(frozen=True)
class MergekitDocument:
    """A mergekit YAML, and the folder it is in."""

    raw: Mapping[str, Any]
    folder: Path

    @cached_property
    def method(self) -> str:
        """mergekit's name of the method."""
        return str(self.raw["merge_method"])

    @cached_property
    def base(self) -> Model | None:
        """base_model, None if there is none."""
        if self.raw.get("base_model") is None:
            return None
        return parse_model(self.raw["base_model"], "base_model", folder=self.folder)

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of the whole merge."""
        return to_mapping(self.raw.get("parameters"), "parameters")

    @cached_property
    def slices(self) -> list[Slice]:
        """The slices of the merged language model; one without layers for a list of models.

        Raises:
            RecipeError: models or slices are malformed.
        """
        where, definition = "", self.raw
        if "modules" in self.raw:
            name, definition = self.language_module
            where = f"modules.{name}."
        if ("models" in definition) == ("slices" in definition):
            refuse(f"{where}models", "give either 'models' or 'slices'")
        parameters = to_mapping(definition.get("parameters"), f"{where}parameters") if where else {}
        if "models" in definition:
            part = parse_models(definition["models"], f"{where}models", folder=self.folder)
            slices = [part]
        else:
            slices = parse_slices(definition["slices"], f"{where}slices", folder=self.folder)
        return [
            Slice(part.sources, {**parameters, **part.parameters}, part.layers) for part in slices
        ]

    @cached_property
    def language_module(self) -> tuple[str, Mapping[str, Any]]:
        """The name of the module that is the language model, and its definition."""
        modules = to_mapping(self.raw["modules"], "modules")
        for name in LANGUAGE_MODULES:
            if name in modules:
                definition = to_mapping(modules[name], f"modules.{name}")
                check_entry(definition, ("models", "slices", "parameters"), f"modules.{name}")
                return name, definition
        raise RecipeError(
            f"modules: none of them is the language model ({', '.join(LANGUAGE_MODULES)});"
            f" there are {', '.join(map(str, modules)) or 'none'}"
        )

    @cached_property
    def kept_modules(self) -> list[str]:
        """Names of the modules beside the language model: all of them are one model's.

        Raises:
            RecipeError: one of them is merged, or is not that of the model whose encoders are kept.
        """
        if "modules" not in self.raw:
            return []
        names = []
        for name, raw in to_mapping(self.raw["modules"], "modules").items():
            if name == self.language_module[0]:
                continue
            where = f"modules.{name}"
            definition = to_mapping(raw, where)
            check_entry(definition, ("models", "slices", "parameters"), where)
            if "models" not in definition or "slices" in definition:
                refuse(where, "expected 'models' with the one model whose module is kept")
            part = parse_models(definition["models"], f"{where}.models", folder=self.folder)
            models = [source.model for source in part.sources]
            if models != [self.first_model]:
                refuse(
                    where,
                    f"is that of {str(self.first_model)!r} here, and no merge of several or another"
                    " model's. Give that model alone, or leave 'modules' out to merge all tensors",
                )
            names.append(str(name))
        return names

    @cached_property
    def first_model(self) -> Model:
        """The base, or the first model: the merged model has its configuration and encoders."""
        return self.base or self.slices[0].sources[0].model

    @cached_property
    def num_layers(self) -> int:
        """Layers of the merged model."""
        last = self.slices[-1].layers
        if last is not None:
            return last[1]
        return self.count_layers(self.first_model)

    def count_layers(self, model: Model) -> int:
        """Return the layers of a model as its configuration states them."""
        return int(self.open(model).text_config.get("num_hidden_layers", 0))

    def open(self, model: Model) -> Checkpoint:
        """Return the checkpoint of a model. Raises CheckpointError."""
        return Checkpoint(self.to_path(model.path), owner=f"model {model.path!r}")

    def to_path(self, path: str) -> str:
        """Return a model's path, relative to the YAML or, as in mergekit, to the working folder."""
        return to_uri(path, folder=self.folder)

    def is_base(self, model: Model) -> bool:
        """Return whether a model is base_model, under whatever path."""
        if self.base is None or model.adapter != self.base.adapter:
            return False
        return model == self.base or self.to_path(model.path) == self.to_path(self.base.path)

    def check_keys(self) -> None:
        """Warn of keys that mergekit does not read. Raises RecipeError for files of other tools."""
        if "gate_mode" in self.raw:
            refuse("gate_mode", MOE_REFUSAL)
        for key in self.raw:
            if key not in KNOWN_KEYS:
                log.warning("%s: has no effect, as in mergekit", key)
        if "modules" in self.raw:
            for key in ("models", "slices"):
                if key in self.raw:
                    refuse(key, "is given beside 'modules'. Give one of them")
