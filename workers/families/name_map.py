"""Canonical tensor names of a checkpoint, from its model class in transformers.

Classes rename tensors when they load them, and several generations of names exist for one class.
The class itself knows them all: it is made on the meta device (no weights are read), its conversion
mapping gives the name in memory of every stored tensor, `get_decoder` and `get_output_embeddings`
say which tensors are the language model's. transformers is imported on first use only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any

from mmerge.manifests.errors import CheckpointError, first_line
from mmerge.manifests.format.tensor_names import move_layer, split_layer
from mmerge.workers.families.conversions import Conversion, describe_conversion
from mmerge.workers.families.model_config import (
    find_model_class,
    to_architecture,
    to_loadable_config,
)
from mmerge.workers.families.plain_classes import to_plain_config

HEAD_WEIGHT = "head.weight"
"""Canonical name of the language-model head."""
_DECODER = "decoder."
_HEAD = "head."
_OTHER = "other."
_UNPLACED = "unplaced."
_PLACE = " <- "
"""Separates a parameter from the place of a stored tensor in it."""
_CACHED_CLASSES = 64


class UnknownClass(CheckpointError):
    """transformers has no class for a configuration, or cannot make it."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a class in memory."""

    shape: tuple[int, ...]
    is_transposed: bool
    """Whether its class multiplies by its matrices from the right, [in, out]."""


@dataclass(frozen=True)
class NameMap:
    """Canonical names of the tensors in a checkpoint's files.

    Names of the language model begin with `decoder.` or `head.`, and are equal for a plain language
    model and for every multimodal class around it. All other names are those in memory.
    """

    canonical: dict[str, str]
    """By stored name."""
    class_name: str
    """The class of transformers that gave the names."""
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    """By stored name, of the tensors that are converted when a class loads them."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """By canonical name without a place."""

    @property
    def stored(self) -> dict[str, str]:
        """Stored names by canonical name. Raises CheckpointError if two tensors share one."""
        names: dict[str, str] = {}
        for stored, canonical in self.canonical.items():
            if canonical in names:
                raise CheckpointError(
                    f"{names[canonical]} and {stored} are one parameter of {self.class_name}, so"
                    " the files hold it twice. Remove one of them"
                )
            names[canonical] = stored
        return names

    def by_parameter(self) -> dict[str, dict[str, str]]:
        """Return stored names by canonical name, grouped by the parameter that holds them."""
        groups: dict[str, dict[str, str]] = {}
        for stored, canonical in self.canonical.items():
            groups.setdefault(parameter_of(canonical), {})[canonical] = stored
        return groups


@dataclass(frozen=True)
class _ModelNames:
    """What a class tells of its names."""

    class_name: str
    parameters: Mapping[str, Parameter]
    """Parameters and buffers by their name in memory."""
    decoder: str
    """Module path of the language model without its head, with its dot; may be empty."""
    head: str
    """Module path of the head, with its dot; empty if there is none."""
    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    base_model_prefix: str
    unshared_layers: frozenset[int]
    """Decoder layers that the plain language model lacks: cross-attention between its own."""


def is_language_name(canonical: str) -> bool:
    """Return whether a canonical name is one of the language model."""
    return canonical.startswith((_DECODER, _HEAD))


def parameter_of(canonical: str) -> str:
    """Return the canonical name of the parameter that a tensor is, or is a part of."""
    return canonical.partition(_PLACE)[0]


def map_names(config: Mapping[str, Any], names: Iterable[str]) -> NameMap:
    """Return the canonical names of stored tensors.

    Tensors that a class fuses when it loads them (mixtures of experts) are named by the fused
    parameter and by their place in it, so they match only those of an equal layout.

    Args:
        config: the checkpoint's config.json.
        names: of the tensors in its files.

    Raises:
        UnknownClass: transformers has no such class, or cannot make it from the configuration.
    """
    model = _read_model_names(json.dumps(config, sort_keys=True))
    canonical: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for name in names:
        canonical[name], conversion = _canonical(name, model)
        if conversion is not None:
            conversions[name] = conversion
    parameters = {
        _place_parameter(name, model): parameter for name, parameter in model.parameters.items()
    }
    return NameMap(canonical, model.class_name, conversions, parameters)


def canonical_name(config: Mapping[str, Any], name: str) -> str:
    """Return the canonical name of one tensor as `map_names` does. Raises UnknownClass."""
    return _canonical(name, _read_model_names(json.dumps(config, sort_keys=True)))[0]


def list_memory_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a class's parameters in memory, by canonical name.

    Raises:
        UnknownClass: as `map_names`.
    """
    model = _read_model_names(json.dumps(config, sort_keys=True))
    return {_place_parameter(name, model): name for name in model.parameters}


def to_saved_form(config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return a parameter as its class saves it: tensors by their names in files.

    Args:
        config: the config.json of the class.
        name: of the parameter in memory.
        value: the parameter.

    Raises:
        UnknownClass: transformers has no such class, or cannot convert the parameter.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with _translated_errors(config):
        model = _read_meta_model(json.dumps(config, sort_keys=True))
        saved: dict[str, Any] = revert_weight_conversion(model, {name: value})
        return saved


def map_language_model(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the stored names of a multimodal model's language model, by name in its plain class.

    Args:
        config: the multimodal model's config.json.
        names: of the tensors in its files.

    Raises:
        UnknownClass: transformers has no such class, or no class for its language model alone.
        CheckpointError: the class fuses tensors of the language model when it loads them.
    """
    plain = _read_plain_names(json.dumps(config, sort_keys=True))
    stored_names = {}
    for canonical, stored in map_names(config, names).stored.items():
        if not is_language_name(canonical):
            continue
        if _PLACE in canonical:
            raise CheckpointError(
                f"{stored} is fused with others in memory, which is not loaded from within a"
                " multimodal model"
            )
        kind, _, path = canonical.partition(".")
        prefix = plain.head if f"{kind}." == _HEAD else plain.decoder
        stored_names[prefix + path] = stored
    return stored_names


def _canonical(name: str, model: _ModelNames) -> tuple[str, Conversion | None]:
    """Return the canonical name of a stored tensor, and how it is converted."""
    from transformers.core_model_loading import apply_renamings, rename_source_key

    renamings, converters = list(model.renamings), list(model.converters)
    parameter, pattern = rename_source_key(
        name, renamings, converters, model.base_model_prefix, model.parameters
    )
    if parameter not in model.parameters:
        return f"{_UNPLACED}{name}", None
    canonical = _place_parameter(parameter, model)
    if pattern is None:
        return canonical, None
    renamed = apply_renamings(name, renamings)
    tail = renamed[_count_equal(renamed, parameter) :]
    place = f"{_PLACE}{pattern} {'.'.join(re.findall(r'[0-9]+', tail))}".rstrip()
    return f"{canonical}{place}", describe_conversion(pattern, tail, model.converters)


def _place_parameter(parameter: str, model: _ModelNames) -> str:
    """Return the canonical name of a parameter in memory."""
    if model.head and parameter.startswith(model.head):
        return f"{_HEAD}{parameter[len(model.head) :]}"
    if not parameter.startswith(model.decoder):
        return f"{_OTHER}{parameter}"
    path = parameter[len(model.decoder) :]
    split = split_layer(path)
    if split is None or split.prefix or not model.unshared_layers:
        return f"{_DECODER}{path}"
    if split.layer in model.unshared_layers:
        return f"{_OTHER}{parameter}"
    shift = sum(unshared < split.layer for unshared in model.unshared_layers)
    return f"{_DECODER}{move_layer(path, split.layer - shift)}"


def _count_equal(name: str, other: str) -> int:
    """Return how many letters two names have in common at their beginning."""
    pairs = zip(name, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@lru_cache(maxsize=1)
def _read_meta_model(config_json: str) -> Any:
    """Return the model of a config.json on the meta device. Raises CheckpointError."""
    return _make_meta_model(json.loads(config_json))


@lru_cache(maxsize=_CACHED_CLASSES)
def _read_model_names(config_json: str) -> _ModelNames:
    """Return what the class of a configuration tells of its names. Raises UnknownClass."""
    raw = json.loads(config_json)
    with _translated_errors(raw):
        return _read_names(_make_meta_model(raw))


@lru_cache(maxsize=_CACHED_CLASSES)
def _read_plain_names(config_json: str) -> _ModelNames:
    """Return what the class of the language model alone tells of its names. Raises UnknownClass."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    raw = json.loads(config_json)
    with _translated_errors(raw):
        text = to_plain_config(_make_config(raw).get_text_config())
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
        if model_class is None:
            raise UnknownClass(f"transformers has no causal language model for {text.model_type!r}")
        with torch.device("meta"):
            return _read_names(model_class(text))


def _read_names(model: Any) -> _ModelNames:
    decoder = _find_decoder(model)
    paths = {id(module): name for name, module in model.named_modules()}
    transforms = get_transforms(model)
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    return _ModelNames(
        class_name=type(model).__name__,
        parameters=_read_parameters(model),
        decoder=_with_dot(paths[id(decoder)]),
        head=_with_dot(paths.get(id(head), "")),
        renamings=transforms[0],
        converters=transforms[1],
        base_model_prefix=model.base_model_prefix,
        unshared_layers=frozenset(getattr(text, "cross_attention_layers", None) or ()),
    )


@contextmanager
def _translated_errors(raw: Mapping[str, Any]) -> Iterator[None]:
    """Raise UnknownClass for whatever goes wrong while a model of a configuration is made."""
    try:
        yield
    except CheckpointError as error:
        raise UnknownClass(Exception.__str__(error)) from error
    except Exception as error:  # model code of transformers raises anything on odd configurations
        import transformers

        reason = first_line(error)
        raise UnknownClass(
            f"transformers {transformers.__version__} cannot make"
            f" {to_architecture(raw.get('architectures'), where='config.json')} of config.json"
            f" ({type(error).__name__}: {reason})"
        ) from error


def _read_parameters(model: Any) -> dict[str, Parameter]:
    """Return the parameters and buffers of a model that are saved."""
    modules = dict(model.named_modules())
    parameters = {}
    for name, value in model.state_dict().items():
        owner = modules.get(name.rpartition(".")[0])
        is_transposed = bool(getattr(owner, "is_transposed", False))
        parameters[name] = Parameter(tuple(value.shape), is_transposed)
    return parameters


def get_transforms(model: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the renamings and the converters that transformers applies to stored names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    renamings = tuple(item for item in transforms if isinstance(item, WeightRenaming))
    converters = tuple(item for item in transforms if isinstance(item, WeightConverter))
    return renamings, converters


def _make_meta_model(raw: dict[str, Any]) -> Any:
    """Return the model of a config.json on the meta device. Raises CheckpointError."""
    import torch

    where = "config.json"
    config = _make_config(raw)
    name = to_architecture(raw.get("architectures"), where=where)
    model_class = find_model_class(name, where=where)
    with torch.device("meta"):
        return model_class(config)


def _make_config(raw: dict[str, Any]) -> Any:
    """Return the configuration of a config.json. Raises CheckpointError."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnknownClass(
            f"transformers {transformers.__version__} does not know model type {model_type!r}"
        )
    return CONFIG_MAPPING[model_type].from_dict(to_loadable_config(raw, where="config.json"))


def _find_decoder(model: Any) -> Any:
    """Return the language model without its head within a model."""
    decoder = getattr(model, "thinker", model).get_decoder()
    # Some classes give their causal language model, head included.
    if decoder.get_output_embeddings() is not None and hasattr(decoder, "model"):
        return decoder.model
    return decoder


def _with_dot(path: str) -> str:
    return f"{path}." if path else ""
