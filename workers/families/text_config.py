"""The configuration of a language model with the values that its class in transformers implies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mmerge.manifests.errors import CheckpointError, first_line
from mmerge.workers.families.model_config import to_loadable_config
from mmerge.workers.families.registry import text_config_of

_CACHED_CONFIGS = 64
_SIZES_WITH_DEFAULTS = ("head_dim", "num_key_value_heads")
"""Sizes that files often leave to the class."""


def resolve_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text configuration of a config.json, absent and null values filled in.

    transformers is imported for it. Where it does not know the model type, the result is the text
    configuration without its null values.

    Args:
        config: the checkpoint's config.json.

    Raises:
        CheckpointError: transformers refuses the configuration, or must not be given it.
    """
    return dict(_resolve(json.dumps(config, sort_keys=True)))


@lru_cache(maxsize=_CACHED_CONFIGS)
def _resolve(config_json: str) -> Mapping[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = json.loads(config_json)
    if raw.get("model_type") not in CONFIG_MAPPING:
        return {key: value for key, value in text_config_of(raw).items() if value is not None}
    config_class = CONFIG_MAPPING[raw["model_type"]]
    raw = to_loadable_config(raw, where="config.json")
    try:
        try:
            config = config_class.from_dict(raw)
        except Exception:  # noqa: BLE001 - some classes take null for a default, others refuse it
            config = config_class.from_dict(_without_null_sizes(raw))
        values = _read_values(config)
    except Exception as error:  # classes of transformers raise anything on odd values
        reason = first_line(error)
        raise CheckpointError(
            f"transformers cannot read a configuration of model type {raw['model_type']!r}"
            f" ({type(error).__name__}: {reason}). Compare it with the checkpoint's original"
        ) from error
    return {key: value for key, value in values.items() if value is not None}


def _without_null_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without null sizes, in its text configuration too."""
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            kept[key] = _without_null_sizes(value)
        elif value is not None or key not in _SIZES_WITH_DEFAULTS:
            kept[key] = value
    return kept


def _read_values(config: Any) -> dict[str, Any]:
    """Return the values of the language model in a configuration of transformers."""
    text = getattr(config, "thinker_config", config).get_text_config()
    values: dict[str, Any] = text.to_dict()
    for key in _SIZES_WITH_DEFAULTS:
        if values.get(key) is None:
            values[key] = getattr(text, key, None)
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if values["head_dim"] is None and isinstance(heads, int) and isinstance(hidden, int):
        values["head_dim"] = hidden // heads
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    return values
