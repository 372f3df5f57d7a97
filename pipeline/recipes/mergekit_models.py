"""Models, sources and slices of a mergekit YAML."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mmerge.manifests.errors import RecipeError

log = logging.getLogger("mmerge.recipe")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Model:
    """A model as a YAML names it: a path or `org/name@revision`, and an adapter merged into it."""

    path: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


@dataclass(frozen=True)
class Source:
    """One model of a slice, with the layers that are read of it: first, and the one after last."""

    model: Model
    parameters: Mapping[str, Any]
    layers: tuple[int, int] | None = None
    """None for a YAML without slices: all layers."""


@dataclass(frozen=True)
class Slice:
    """Successive layers of the merged model, with the sources that they are merged from."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    layers: tuple[int, int] | None = None
    """First and last layer in the merged model, both included; the first slice begins with −1, the
    embedding, the last ends behind the last layer. None for a YAML without slices.
    """

    def source_of(self, model: Model) -> Source | None:
        """Return the source that reads a model, None if there is none."""
        return next((source for source in self.sources if source.model == model), None)


def parse_model(value: Any, where: str, *, folder: Path) -> Model:
    """Return the model that a YAML names: text, or a mapping with path, revision and lora.

    Raises:
        RecipeError: it is neither.
    """
    reference = value.get("model") if isinstance(value, dict) else None
    adapter = None
    if isinstance(reference, dict):
        value = reference.get("path")
        if isinstance(value, str) and reference.get("revision"):
            value = f"{value}@{reference['revision']}"
        lora = reference.get("lora")
        if isinstance(lora, dict):
            revision = lora.get("revision")
            lora = lora.get("path")
            lora = f"{lora}@{revision}" if revision else lora
        if lora is not None and not isinstance(lora, str):
            raise RecipeError(f"{where}.lora: expected the path of an adapter, got {lora!r}")
        adapter = lora
    elif isinstance(value, dict) and isinstance(value.get("path"), str):
        return parse_model({"model": value}, where, folder=folder)
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}: expected the path of a model, got {value!r}")
    path, plus, merged_adapter = value.partition("+")
    if not plus or (folder / value).exists():
        return Model(value, adapter)
    if adapter is not None or not path or not merged_adapter or "+" in merged_adapter:
        raise RecipeError(f"{where}: {value!r}: give one adapter, as MODEL+ADAPTER")
    return Model(path, merged_adapter)


def to_uri(path: str, *, folder: Path) -> str:
    """Return a model's path, relative to the YAML or, as in mergekit, to the working folder."""
    if "://" in path or Path(path).is_absolute():
        return path
    if (folder / path).exists():
        return str((folder / path).absolute())
    if Path(path).exists():
        return str(Path(path).absolute())
    # The store of the Hub looks into the cache first.
    return f"hf://{path}" if _HUB_NAME.fullmatch(path) else path


def parse_models(entries: Any, where: str, *, folder: Path) -> Slice:
    """Return a list of models as one slice of all layers. Raises RecipeError."""
    sources: list[Source] = []
    for index, entry in enumerate(to_list(entries, where)):
        place = f"{where}.{index}"
        check_entry(entry, ("model", "parameters"), place)
        model = parse_model(entry.get("model"), f"{place}.model", folder=folder)
        _refuse_repeated(model, sources, place)
        parameters = to_mapping(entry.get("parameters"), f"{place}.parameters")
        sources.append(Source(model, parameters))
    return Slice(tuple(sources), {})


def parse_slices(entries: Any, where: str, *, folder: Path) -> list[Slice]:
    """Return the slices of a YAML, their layers numbered in the merged model.

    Embeddings belong to the first slice, the last norm and the head to the last.

    Raises:
        RecipeError: a slice is malformed, or its sources have different numbers of layers.
    """
    slices = []
    for index, entry in enumerate(to_list(entries, where)):
        slices.append(_parse_slice(entry, f"{where}.{index}", folder=folder))
    numbered = []
    first = 0
    for index, part in enumerate(slices):
        start, stop = part.sources[0].layers or (0, 0)
        last = first + stop - start - 1
        is_last = index == len(slices) - 1
        layers = (first if index else -1, last + 1 if is_last else last)
        numbered.append(replace(part, layers=layers))
        first = last + 1
    return numbered


def _parse_slice(entry: Any, where: str, *, folder: Path) -> Slice:
    check_entry(entry, ("sources", "parameters"), where)
    sources: list[Source] = []
    for index, source in enumerate(to_list(entry.get("sources"), f"{where}.sources")):
        place = f"{where}.sources.{index}"
        check_entry(source, ("model", "layer_range", "parameters"), place)
        layers = _parse_range(source.get("layer_range"), place)
        model = parse_model(source.get("model"), f"{place}.model", folder=folder)
        _refuse_repeated(model, sources, place)
        parameters = to_mapping(source.get("parameters"), f"{place}.parameters")
        sources.append(Source(model, parameters, layers))
    lengths = {stop - start for start, stop in (source.layers or (0, 0) for source in sources)}
    if len(lengths) != 1:
        shown = ", ".join(str(list(source.layers or ())) for source in sources)
        raise RecipeError(
            f"{where}: its sources have different numbers of layers ({shown}), as mergekit refuses"
            " too. Give ranges of one length"
        )
    return Slice(tuple(sources), to_mapping(entry.get("parameters"), f"{where}.parameters"))


def _refuse_repeated(model: Model, sources: Sequence[Source], where: str) -> None:
    """Refuse a model that is given twice in one merge, as mergekit does since 0.1."""
    if any(source.model == model for source in sources):
        raise RecipeError(
            f"{where}: {str(model)!r} is given twice among the models of one merge, which mergekit"
            " refuses too. Give it once; of linear methods add the weights"
        )


def _parse_range(value: Any, where: str) -> tuple[int, int]:
    is_pair = isinstance(value, list) and len(value) == 2
    is_whole = is_pair and all(type(layer) is int for layer in value)
    if not is_whole or not 0 <= value[0] < value[1]:
        raise RecipeError(f"{where}.layer_range: expected [first, last + 1], got {value!r}")
    return value[0], value[1]


def to_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a mapping; an empty one for null. Raises RecipeError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a mapping, got {value!r}")
    return value


def to_list(value: Any, where: str) -> list[Any]:
    """Return a list that is not empty. Raises RecipeError for anything else."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: expected a list, got {value!r}")
    return value


MISPLACED_KEYS = ("weight", "density", "gamma", "epsilon", "t", "scale", "lambda", "normalize")
"""Parameters that YAMLs have beside `model`, where mergekit does not read them."""


def check_entry(entry: Any, keys: Sequence[str], where: str) -> None:
    """Warn of keys that mergekit does not read.

    Raises:
        RecipeError: the entry is no mapping, or has a parameter where mergekit does not read it.
    """
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(keys)}, got {entry!r}")
    for key in entry:
        if key in keys:
            continue
        if key in MISPLACED_KEYS:
            raise RecipeError(
                f"{where}.{key}: mergekit does not read it here. Write it under 'parameters' of"
                " this entry"
            )
        hint = ""
        if key == "revision":
            hint = ". A revision is read as {model: {model: {path, revision}}}"
        log.warning("%s.%s: has no effect, as in mergekit%s", where, key, hint)


def refuse(key: str, reason: str) -> NoReturn:
    """Raise RecipeError for a key of mergekit's YAML."""
    raise RecipeError(f"{key}: {reason}")
