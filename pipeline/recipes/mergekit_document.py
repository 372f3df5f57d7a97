"""A mergekit YAML: its models, or its slices of equal layer ranges, checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from mmerge.manifests.errors import CheckpointError, RecipeError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.tokenizer import read_vocabulary

log = logging.getLogger("mmerge.recipe")

KNOWN_KEYS = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
UNSUPPORTED_KEYS = {
    "modules": "merging parts of a multimodal model by rules of their own is not supported",
    "gate_mode": "making a mixture of experts (mergekit-moe) is not supported",
}
"""Keys that change the result and have no counterpart here."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Slice:
    """A range of layers with its parameters: of the slice, and of every model."""

    layers: tuple[int, int] | None
    """First and last layer, both included; None for a YAML without slices."""
    parameters: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]


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
    def base(self) -> str | None:
        """base_model, None if there is none."""
        if self.raw.get("base_model") is None:
            return None
        return self._parse_model(self.raw["base_model"], "base_model")

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of the whole merge."""
        return _to_mapping(self.raw.get("parameters"), "parameters")

    @cached_property
    def num_layers(self) -> int:
        """Layers of the models, from the configuration of one of them."""
        entries = self.raw.get("models") or self.raw["slices"][0]["sources"]
        model = self.base or self._parse_model(entries[0].get("model"), "models.0.model")
        checkpoint = Checkpoint(self.to_path(model), owner=f"model {model!r}")
        return int(checkpoint.text_config.get("num_hidden_layers", 0))

    def to_path(self, model: str) -> str:
        """Return a model's path, relative to the YAML or, as in mergekit, to the working folder."""
        if "://" in model or Path(model).is_absolute():
            return model
        if (self.folder / model).exists():
            return str((self.folder / model).absolute())
        if Path(model).exists():
            return str(Path(model).absolute())
        # The store of the Hub looks into the cache first.
        return f"hf://{model}" if _HUB_NAME.fullmatch(model) else model

    def check_keys(self) -> None:
        """Raise RecipeError for a key that is unknown or asks for what is not supported."""
        for key in self.raw:
            if key in UNSUPPORTED_KEYS:
                refuse(str(key), UNSUPPORTED_KEYS[key])
            if key not in KNOWN_KEYS:
                log.warning("%s: has no effect, as in mergekit", key)
        self._check_tokenizer("tokenizer_source", self.raw.get("tokenizer_source"))
        tokenizer = self.raw.get("tokenizer")
        if isinstance(tokenizer, dict) and set(tokenizer) - {"source"}:
            refuse("tokenizer", f"{sorted(set(tokenizer) - {'source'})} are not supported")
        source = tokenizer.get("source") if isinstance(tokenizer, dict) else tokenizer
        self._check_tokenizer("tokenizer", source)
        if self.raw.get("chat_template") not in (None, "auto"):
            refuse("chat_template", "is not supported: the base's is kept")
        if ("models" in self.raw) == ("slices" in self.raw):
            refuse("models", "give either 'models' or 'slices'")

    def _check_tokenizer(self, key: str, source: object) -> None:
        """Refuse a tokenizer other than the base's, unless all models have the same."""
        if source is None or source == "base":
            return
        if source == "union" and self._has_one_tokenizer():
            return
        base = self.base
        if isinstance(source, str) and base and self.to_path(source) == self.to_path(base):
            return
        refuse(
            key,
            f"{source!r} is not supported where tokenizers differ: only the base's is kept. Use"
            " 'base'",
        )

    def _has_one_tokenizer(self) -> bool:
        """Return whether base and models surely give the same ids to the same tokens."""
        models = {model for part in self.read_slices() for model in part.models}
        try:
            vocabularies = [self._read_vocabulary(model) for model in {self.base, *models} if model]
        except CheckpointError:
            return False
        first = vocabularies[0]
        return first is not None and all(vocabulary == first for vocabulary in vocabularies)

    def _read_vocabulary(self, model: str) -> dict[str, int] | None:
        return read_vocabulary(Checkpoint(self.to_path(model), owner=f"model {model!r}"))

    def read_slices(self) -> list[Slice]:
        """Return the slices, which cover all layers; one without layers for a list of models.

        Raises:
            RecipeError: the layer ranges or the models differ, or layers are skipped or repeated.
        """
        if "models" not in self.raw:
            entries = _to_list(self.raw["slices"], "slices")
            return self._extend_to_ends(
                [self._read_slice(entry, f"slices.{i}") for i, entry in enumerate(entries)]
            )
        models: dict[str, Mapping[str, Any]] = {}
        for index, entry in enumerate(_to_list(self.raw["models"], "models")):
            where = f"models.{index}"
            _check_entry(entry, ("model", "parameters"), where)
            name = self._parse_model(entry.get("model"), f"{where}.model")
            _refuse_repeated(name, models, where)
            models[name] = _to_mapping(entry.get("parameters"), f"{where}.parameters")
        return [Slice(None, {}, models)]

    def _read_slice(self, entry: Any, where: str) -> Slice:
        """Return a slice as written: first layer, and the layer after the last."""
        _check_entry(entry, ("sources", "parameters"), where)
        ranges: set[tuple[int, int]] = set()
        models: dict[str, Mapping[str, Any]] = {}
        for index, source in enumerate(_to_list(entry.get("sources"), f"{where}.sources")):
            place = f"{where}.sources.{index}"
            _check_entry(source, ("model", "layer_range", "parameters"), place)
            ranges.add(_parse_range(source.get("layer_range"), place))
            name = self._parse_model(source.get("model"), f"{place}.model")
            _refuse_repeated(name, models, place)
            models[name] = _to_mapping(source.get("parameters"), f"{place}.parameters")
        if len(ranges) != 1:
            shown = ", ".join(str(list(layer_range)) for layer_range in sorted(ranges))
            raise RecipeError(
                f"{where}: its sources have different layer ranges ({shown}). Give all the same"
            )
        parameters = _to_mapping(entry.get("parameters"), f"{where}.parameters")
        return Slice(ranges.pop(), parameters, models)

    def _extend_to_ends(self, slices: Sequence[Slice]) -> list[Slice]:
        """Return the slices with inclusive layers.

        Embeddings belong to the first slice, the last norm and the head to the last.
        """
        extended, next_layer = [], 0
        for index, part in enumerate(slices):
            assert part.layers is not None
            first, stop = part.layers
            if set(part.models) != set(slices[0].models):
                raise RecipeError(
                    f"slices.{index}: has other models than slices.0. Merge the same models in"
                    " every slice"
                )
            if first != next_layer or stop <= first:
                raise RecipeError(
                    f"slices.{index}: begins at layer {first}, expected {next_layer}: slices that"
                    " skip, repeat or reorder layers are not supported"
                )
            next_layer = stop
            is_last = index == len(slices) - 1
            layers = (first if index else -1, self.num_layers if is_last else stop - 1)
            extended.append(Slice(layers, part.parameters, part.models))
        if next_layer != self.num_layers:
            raise RecipeError(
                f"slices: end at layer {next_layer}, the model has {self.num_layers}: leaving"
                " layers out is not supported"
            )
        return extended

    def _parse_model(self, value: Any, where: str) -> str:
        """Return the path or name of a model, with its revision as NAME@REVISION.

        An adapter of the base stands for the base with that adapter, as in mergekit's BASE+ADAPTER.

        Raises:
            RecipeError: it is no model, or an adapter of another model than base_model.
        """
        reference = value.get("model") if isinstance(value, dict) else None
        if isinstance(reference, dict):
            value = reference.get("path")
            if isinstance(value, str) and reference.get("revision"):
                value = f"{value}@{reference['revision']}"
            if isinstance(value, str) and reference.get("lora"):
                value = f"{value}+{_lora_path(reference['lora'])}"
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{where}: expected the path of a model, got {value!r}")
        model, plus, adapter = value.partition("+")
        if not plus or (self.folder / value).exists():
            return value
        if where == "base_model" or self.base is None:
            raise RecipeError(
                f"{where}: {value!r}: a base with an adapter is not supported. Merge the adapter"
                " into the base first (PEFT: merge_and_unload)"
            )
        if self.to_path(model) != self.to_path(self.base):
            raise RecipeError(
                f"{where}: {value!r}: only adapters of base_model ({self.base!r}) are read. Merge"
                f" this one into {model!r} first (PEFT: merge_and_unload)"
            )
        return adapter


def _lora_path(value: Any) -> Any:
    return value.get("path") if isinstance(value, dict) else value


def _refuse_repeated(model: str, models: Mapping[str, Any], where: str) -> None:
    """Refuse a model that is given twice: mergekit counts both, methods here expect it once."""
    if model in models:
        raise RecipeError(
            f"{where}: {model!r} is given twice. Give it once; of linear methods add the weights"
        )


def _parse_range(value: Any, where: str) -> tuple[int, int]:
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(isinstance(layer, int) for layer in value):
        raise RecipeError(f"{where}.layer_range: expected [first, last + 1], got {value!r}")
    return value[0], value[1]


def _to_mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a mapping, got {value!r}")
    return value


def _to_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: expected a list, got {value!r}")
    return value


def _check_entry(entry: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(keys)}, got {entry!r}")
    for key in entry:
        if key not in keys:
            refuse(f"{where}.{key}", "is not supported")


def refuse(key: str, reason: str) -> NoReturn:
    """Raise RecipeError for a key of mergekit's YAML."""
    raise RecipeError(
        f"{key}: {reason}. Supported are models or slices of equal layer ranges, parameters, dtype,"
        " tokenizer_source: base"
    )
