"""The configuration of a model whose layers were put together from others.

The number of layers and the lists with a value per layer follow. Where a configuration says by a
rule which kind a layer is (every fourth attends globally), the rule must give each layer the kind
that it had, or the layers are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.families.registry import TEXT_CONFIG_KEYS, text_config_of
from mmerge.workers.families.text_config import resolve_text_config

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers; GPT-like classes have the others."""
_PER_LAYER_LISTS = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list", "attention_layers"),
    *("no_rope_layers", "num_key_value_heads", "num_attention_heads", "intermediate_size"),
    *("num_query_heads", "num_kv_heads", "ffn_multipliers", "sliding_window_list"),
    "moe_layer_freq",
)
"""Keys whose list has one value per layer."""
_LAYER_NUMBERS = (
    *("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "moe_layers"),
    *("attn_layer_indices", "global_attn_layers", "dense_layers"),
)
"""Keys whose list has the numbers of some layers."""
_Rule = Callable[[Any, int, int], Any]
"""Returns the kind of a layer from the key's value, the layer's number and the number of layers."""


def _is_multiple(value: Any, layer: int, num_layers: int) -> bool:
    return isinstance(value, int) and value > 0 and (layer + 1) % value == 0


def _is_below(value: Any, layer: int, num_layers: int) -> bool:
    return isinstance(value, int) and layer < value


def _is_among_last(value: Any, layer: int, num_layers: int) -> bool:
    return isinstance(value, int) and layer >= num_layers - value


_RULES: Mapping[str, _Rule] = {
    "decoder_sparse_step": _is_multiple,
    "interleave_moe_layer_step": _is_multiple,
    "no_rope_layer_interval": _is_multiple,
    "full_attention_interval": _is_multiple,
    "sliding_window_pattern": _is_multiple,
    "_sliding_window_pattern": _is_multiple,
    "global_attn_every_n_layers": lambda value, layer, _: bool(value) and layer % value == 0,
    "moe_layer_freq": lambda value, layer, _: isinstance(value, int) and layer % value == 0,
    "moe_layer_interval": _is_multiple,
    "first_k_dense_replace": _is_below,
    "num_dense_layers": _is_below,
    "moe_layer_start_index": _is_below,
    "num_kv_shared_layers": _is_among_last,
}
"""Keys whose number says of which kind each layer is."""
_REPLACED_RULES = {
    "layer_types": (
        *("full_attention_interval", "sliding_window_pattern", "_sliding_window_pattern"),
        "global_attn_every_n_layers",
    ),
    "no_rope_layers": ("no_rope_layer_interval",),
    "mlp_layer_types": ("first_k_dense_replace",),
    "moe_layers": ("interleave_moe_layer_step",),
}
"""Rules that a class reads only where its configuration lacks the list."""


@dataclass(frozen=True)
class StackedLayer:
    """One layer of a model that is put together: its number in the checkpoint it comes from."""

    checkpoint: Checkpoint
    layer: int


def count_layers(checkpoint: Checkpoint) -> int:
    """Return the number of layers that a configuration states.

    Raises:
        CheckpointError: it states none.
    """
    text = checkpoint.text_config
    for key in COUNT_KEYS:
        value = text.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError(
        f"{checkpoint.owner}: {checkpoint.uri}/config.json does not say how many layers the"
        f" language model has (none of {', '.join(COUNT_KEYS)}), so that slices of its layers are"
        " not known"
    )


def stack_configs(layers: Sequence[StackedLayer]) -> dict[str, Any]:
    """Return the first checkpoint's configuration for these layers.

    Raises:
        CheckpointError: a rule of the configuration gives a layer another kind than it had.
    """
    first = layers[0].checkpoint
    resolved = _resolve_all(layers)
    changes: dict[str, Any] = {}
    for key in COUNT_KEYS:
        if key in first.text_config:
            changes[key] = len(layers)
    for key in _PER_LAYER_LISTS:
        values: list[Any] = [resolved[item.checkpoint.uri].get(key) for item in layers]
        if not all(
            isinstance(value, list) and len(value) == count_layers(item.checkpoint)
            for value, item in zip(values, layers, strict=True)
        ):
            _refuse_half_stated(key, values, layers)
            continue
        changes[key] = [value[item.layer] for value, item in zip(values, layers, strict=True)]
    for key in _LAYER_NUMBERS:
        values = [resolved[item.checkpoint.uri].get(key) for item in layers]
        if any(isinstance(value, list) for value in values):
            changes[key] = [
                number
                for number, (value, item) in enumerate(zip(values, layers, strict=True))
                if isinstance(value, list) and item.layer in value
            ]
    _check_rules(layers, resolved, changes)
    return change_text_config(first.config, changes)


def change_text_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with other values in the part that describes the language model."""
    changed = dict(config)
    for key in TEXT_CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            changed[key] = {**config[key], **changes}
            return changed
    if isinstance(config.get("thinker_config"), dict):
        changed["thinker_config"] = change_text_config(config["thinker_config"], changes)
        return changed
    return {**changed, **changes}


def _resolve_all(layers: Sequence[StackedLayer]) -> dict[str, dict[str, Any]]:
    """Return by URI the text configurations with the values that their classes imply.

    What files leave to the class (the kind of each layer) depends on the number of layers, and so
    must be written out.
    """
    resolved = {}
    for item in layers:
        if item.checkpoint.uri in resolved:
            continue
        try:
            values = resolve_text_config(item.checkpoint.config)
        except CheckpointError as error:
            raise CheckpointError(f"{item.checkpoint.owner}: {Exception.__str__(error)}") from error
        resolved[item.checkpoint.uri] = text_config_of(item.checkpoint.config) | values
    return resolved


def _refuse_half_stated(key: str, values: Sequence[Any], layers: Sequence[StackedLayer]) -> None:
    """Refuse a list that only some of the checkpoints have, or that is of another length."""
    listing = [item for value, item in zip(values, layers, strict=True) if isinstance(value, list)]
    if not listing:
        return
    checkpoint = listing[0].checkpoint
    raise CheckpointError(
        f"{checkpoint.owner}: {checkpoint.uri}/config.json has a list under {key!r}, and it or"
        " another checkpoint of the slices has no value there for each layer. Slice layers of"
        " models of one kind"
    )


def _check_rules(
    layers: Sequence[StackedLayer],
    resolved: Mapping[str, Mapping[str, Any]],
    changes: Mapping[str, Any],
) -> None:
    values = resolved[layers[0].checkpoint.uri]
    replaced = {
        rule for key, rules in _REPLACED_RULES.items() if changes.get(key) for rule in rules
    }
    for key, rule in _RULES.items():
        value = values.get(key)
        if key in replaced or not isinstance(value, int) or isinstance(value, bool):
            continue
        for number, item in enumerate(layers):
            own_value = resolved[item.checkpoint.uri].get(key)
            before = rule(own_value, item.layer, count_layers(item.checkpoint))
            if before != rule(value, number, len(layers)):
                raise CheckpointError(
                    f"{item.checkpoint.owner}: layer {item.layer} of {item.checkpoint.uri} would"
                    f" become layer {number}, which is of another kind by {key} {value} of the"
                    " configuration. Choose slices that keep the pattern of the layers"
                )
