"""Registry of model families: built-in ones and those of the entry-point group `mmerge.families`.

An entry point names a family as `name = "module:attribute"`; the attribute is a `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.families.generic import make_generic
from mmerge.workers.families.interface import Family, Projection, Role, Shapes

ENTRY_POINT_GROUP = "mmerge.families"
_BUILT_IN: Mapping[str, str] = {
    "llama": "mmerge.workers.families.llama:LLAMA",
    "phi3": "mmerge.workers.families.phi3:PHI3",
    "gpt_neox": "mmerge.workers.families.gpt_neox:GPT_NEOX",
    "starcoder2": "mmerge.workers.families.starcoder2:STARCODER2",
}
TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config")
"""Keys of a multimodal config.json that hold the configuration of its language model."""

_PART_KEYS = (*TEXT_CONFIG_KEYS, "thinker_config", "vision_config", "audio_config")
"""Keys of a multimodal config.json that hold the configurations of its parts."""


@cache
def list_families() -> tuple[Family, ...]:
    """Return every known family: those of entry points first, so that they can refine ours.

    Raises:
        CheckpointError: an entry point cannot be imported, or is not a `Family`.
    """
    third_party = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    built_in = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _BUILT_IN.items()]
    return tuple(_load_family(point) for point in [*third_party, *built_in])


def _load_family(point: EntryPoint) -> Family:
    where = f"model family {point.name!r} (entry point {point.value})"
    try:
        family = point.load()
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: cannot be imported ({error}). Repair or uninstall the package that"
            " declares it"
        ) from error
    if not isinstance(family, Family):
        raise CheckpointError(
            f"{where}: expected a mmerge.workers.families.interface.Family, got"
            f" {type(family).__name__}"
        )
    return family


def find_family(shapes: Shapes, text_config: Mapping[str, Any], *, where: str) -> Family:
    """Return the family of a language model: by its model type, else by its tensor names.

    A family is taken only if it knows every matrix of the layers. Where none does, the result is
    the generic family, which decides from shapes and refuses what needs more.

    Args:
        shapes: by name, of all tensors of a base model.
        text_config: its text configuration.
        where: names the checkpoint in errors.

    Raises:
        CheckpointError: the names do not tell embedding and layers.
    """
    model_type = str(text_config.get("model_type", ""))
    families = sorted(list_families(), key=lambda family: model_type not in family.model_types)
    for family in families:
        if family.fits(shapes, model_type=model_type):
            return family
    return make_generic(shapes, text_config, where=where)


def role_of(name: str) -> Role | None:
    """Return what a tensor is in the first family that knows its name, None if none does.

    For code that sees names alone (methods, parameter schedules). Names of different families
    agree on the role wherever they are equal, which a test checks.
    """
    for family in list_families():
        role = family.role_of(name)
        if role is not None:
            return role
    return None


def projection_of(name: str) -> Projection | None:
    """Return the projection that a tensor belongs to in the first family that knows its name."""
    for family in list_families():
        projection = family.projection_of(name)
        if projection is not None:
            return projection
    return None


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers is used before them: an embedding."""
    role = role_of(name)
    # Of unknown names those of token and position embeddings contain "embed".
    return role == "embedding" if role is not None else "embed" in name


def parse_config(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the JSON object of a config.json. Infinity is allowed: Python's own writer puts it.

    Raises:
        ValueError: it is no JSON object; the message begins with `where`.
    """
    config = parse_json(data, what=where, allow_infinity=True)
    if not isinstance(config, dict):
        raise ValueError(f"{where}: is no JSON object")
    return config


def is_multimodal_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes a model of several parts."""
    return any(isinstance(config.get(key), dict) for key in _PART_KEYS)


def text_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the language model."""
    for key in TEXT_CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            return dict(config[key])
    if isinstance(config.get("thinker_config"), dict):
        # Omni models hold a second language model, which speaks ("talker_config").
        return text_config_of(config["thinker_config"])
    return dict(config)
