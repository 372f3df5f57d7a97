"""Base and experts of a mergekit YAML: the models of its slices, matched from slice to slice."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.mergekit_document import MergekitDocument
from mmerge.pipeline.recipes.mergekit_models import Model, Slice, Source
from mmerge.workers.checkpoints.checkpoint import Checkpoint

log = logging.getLogger("mmerge.recipe")


@dataclass(frozen=True)
class MergekitExpert:
    """One expert: its source in every slice."""

    sources: tuple[Source, ...]


class MergekitInputs:
    """What a mergekit YAML merges, as base and experts of a recipe."""

    def __init__(
        self, document: MergekitDocument, *, takes_base_as_model: bool, ignores_base: bool
    ) -> None:
        """Sort the models of a document.

        Args:
            document: the YAML.
            takes_base_as_model: whether base_model is one more model, not what others are compared
                with.
            ignores_base: whether base_model has no effect.
        """
        self._document = document
        self._takes_base_as_model = takes_base_as_model
        self._ignores_base = ignores_base
        if ignores_base and document.base is not None:
            log.warning("base_model: has no effect with %s", document.method)

    @property
    def has_base(self) -> bool:
        """Whether base_model is the base of the recipe."""
        has_role = not (self._takes_base_as_model or self._ignores_base)
        return self._document.base is not None and has_role

    @cached_property
    def experts(self) -> list[MergekitExpert]:
        """The experts, in the order of the first slice.

        Raises:
            RecipeError: the slices have different numbers of models, or one lacks the base.
        """
        slices = self._document.slices
        rows = [self._list_experts(part) for part in slices]
        for index, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise RecipeError(
                    f"slices.{index}: has {len(row)} models beside the base, slices.0 has"
                    f" {len(rows[0])}. Merge equally many models in every slice"
                )
        models = [source.model for source in rows[0]]
        if all({source.model for source in row} == set(models) for row in rows):
            # The same models, in whatever order they are listed.
            rows = [sorted(row, key=lambda source: models.index(source.model)) for row in rows]
        return [MergekitExpert(tuple(sources)) for sources in zip(*rows, strict=True)]

    def _list_experts(self, part: Slice) -> list[Source]:
        """Return the sources of a slice that are experts."""
        document = self._document
        if self.has_base:
            return [source for source in part.sources if not document.is_base(source.model)]
        sources = list(part.sources)
        is_listed = any(document.is_base(source.model) for source in sources)
        if self._takes_base_as_model and document.base is not None and not is_listed:
            layers = sources[0].layers
            if any(source.layers != layers for source in sources):
                self._refuse_missing_base()
            sources.insert(0, Source(document.base, {}, layers))
        return sources

    def place_of(self, expert: MergekitExpert) -> dict[str, Any]:
        """Return the keys `path`, `lora` and `slices` of an expert."""
        first = expert.sources[0].model
        keys = self._to_place(first)
        slices = self._to_slices(expert.sources)
        if slices:
            keys["slices"] = slices
        return keys

    def translate_base(self) -> dict[str, Any]:
        """Return the keys `base`, `base_lora` and `base_slices`. Raises RecipeError."""
        document = self._document
        assert document.base is not None
        keys = {"base": document.to_path(document.base.path)}
        if document.base.adapter is not None:
            keys["base_lora"] = document.to_path(document.base.adapter)
        sources = []
        for part in document.slices:
            listed = [source for source in part.sources if document.is_base(source.model)]
            if not listed:
                ranges = {source.layers for source in part.sources}
                if len(ranges) != 1:
                    self._refuse_missing_base()
                listed = [Source(document.base, {}, ranges.pop())]
            sources.append(Source(document.base, {}, listed[0].layers))
        slices = self._to_slices(sources)
        return keys | ({"base_slices": slices} if slices else {})

    def _refuse_missing_base(self) -> None:
        raise RecipeError(
            "slices: base_model is no source of a slice whose sources have different layer ranges,"
            " so its layers are not known. List it with its layer_range"
        )

    def _to_place(self, model: Model) -> dict[str, Any]:
        """Return `path` and `lora` of a model; an adapter of the base is an expert by itself."""
        document = self._document
        if model.adapter is None:
            return {"path": document.to_path(model.path)}
        adapter = document.to_path(model.adapter)
        if self.has_base and document.is_base(Model(model.path)):
            return {"path": adapter}
        return {"path": document.to_path(model.path), "lora": adapter}

    def _to_slices(self, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """Return the slices of one input; none where they are all layers of one model in order."""
        if sources[0].layers is None or self._is_whole(sources):
            return []
        first = self._to_place(sources[0].model)
        slices = []
        for source in sources:
            start, stop = source.layers or (0, 0)
            part: dict[str, Any] = {"layers": [start, stop - 1]}
            place = self._to_place(source.model)
            if place != first:
                part |= place
            slices.append(part)
        return slices

    def _is_whole(self, sources: Sequence[Source]) -> bool:
        next_layer = 0
        for source in sources:
            start, stop = source.layers or (0, 0)
            if source.model != sources[0].model or start != next_layer:
                return False
            next_layer = stop
        return next_layer == self._document.count_layers(sources[0].model)

    def list_kept(self) -> list[str]:
        """Return patterns of the tensors outside the language model, where modules name it.

        They are the first model's: mergekit leaves modules that are not named out of its output.

        Raises:
            RecipeError: modules are merged that are not the language model.
            CheckpointError: the model cannot be read.
        """
        document = self._document
        if "modules" not in document.raw or document.language_module[0] == "default":
            return []
        patterns = list_other_patterns(document.open(document.first_model))
        for name in document.kept_modules:
            if not patterns:
                raise RecipeError(
                    f"modules.{name}: {document.first_model} has no tensors beside its language"
                    " model. Leave 'modules' out, and write what is under"
                    f" {document.language_module[0]!r} at the top"
                )
        return patterns


def list_other_patterns(checkpoint: Checkpoint) -> list[str]:
    """Return patterns that match every tensor of a model but those of its language model."""
    prefix, family = checkpoint.language_prefix, checkpoint.family
    language = [
        name for name in checkpoint.tensors if name.startswith(prefix) or family.is_head(name)
    ]
    others = sorted(set(checkpoint.tensors) - set(language))
    patterns: dict[str, None] = {}
    for name in others:
        parts = name.split(".")
        for length in range(1, len(parts)):
            start = ".".join(parts[:length]) + "."
            if not any(item.startswith(start) for item in language):
                patterns[f"{start}*"] = None
                break
        else:
            patterns[name] = None
    return list(patterns)


def make_names(experts: Sequence[MergekitExpert], *, reserved: Collection[str]) -> list[str]:
    """Return a name for every expert: the last part of its path, made unique."""
    names: list[str] = []
    for expert in experts:
        model = expert.sources[0].model
        path = model.adapter or model.path
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", path.rstrip("/").rpartition("/")[2])[:36] or "model"
        stem = stem if stem[0].isalpha() else f"m-{stem}"
        stem = f"{stem}-model" if stem in reserved else stem
        name, index = stem, 0
        while name in names:
            index += 1
            name = f"{stem}-{index}"
        names.append(name)
    return names
