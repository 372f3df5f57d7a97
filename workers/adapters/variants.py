"""Which kinds of PEFT adapters are read: LoRA, DoRA and token rows; others are refused by name.

The weights are those of PEFT's `merge_and_unload`: W + scale·B·A with LoRA, rows of it scaled to a
trained norm with DoRA, rows of an embedding replaced with `trainable_token_indices`. Variants that
do something else to W, or that trained over another W, would be merged wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmerge.manifests.errors import CheckpointError

REMEDY = "Merge it into its base first (PEFT: merge_and_unload, save_pretrained)"

_CHANGED_BASE: Mapping[str, str] = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
"""Values of `init_lora_weights` whose training begins with a changed base.

Their factors belong to W minus the initial product (or to a quantised W), which only PEFT forms
anew. PEFT writes plain factors instead when it saves with
`path_initial_model_for_weight_conversion`, and says so in the configuration.
"""
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Initialisations that leave the base as it is: after training the factors mean the same."""
_KINDS = ("LORA", "TRAINABLE_TOKENS")
"""Values of `peft_type` that are read."""
_READ_SETTINGS = ("use_rslora", "use_dora")
_SETTINGS: Mapping[str, str] = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA, active only behind its invocation tokens",
    "layer_replication": "LoRA over repeated layers (layer_replication)",
    "fan_in_fan_out": "LoRA of transposed weights (fan_in_fan_out)",
    "lora_bias": "LoRA with biases of its own (lora_bias)",
    "arrow_config": "Arrow, a mixture of adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Settings that change what an adapter adds, and what such an adapter is called."""


def refuse_variants(config: Mapping[str, Any], *, where: str, is_peft_config: bool = True) -> None:
    """Raise CheckpointError where a configuration describes an adapter that is not read.

    Args:
        config: adapter_config.json, or the config.json of a model with adapters.
        where: owner, folder and file, at the beginning of errors.
        is_peft_config: whether all settings are those of an adapter, so that an unknown `use_…` is
            a variant.
    """
    kind = config.get("peft_type", "LORA")
    variants = [] if kind in _KINDS else [str(kind)]
    variants += [name for key, name in _SETTINGS.items() if config.get(key)]
    if is_peft_config:
        variants += [key for key in config if _is_unknown_variant(key) and config[key]]
    changed = _find_changed_base(config.get("init_lora_weights"))
    variants += [f"LoRA initialised by {changed}, which changes the base"] if changed else []
    if not variants:
        return
    remedy = REMEDY
    if changed:
        remedy += ", or save it with path_initial_model_for_weight_conversion"
    raise CheckpointError(
        f"{where}: only LoRA, DoRA and trained token rows are read, this is"
        f" {' and '.join(variants)}. {remedy}"
    )


def _is_unknown_variant(key: str) -> bool:
    return key.startswith("use_") and key not in (*_SETTINGS, *_READ_SETTINGS)


def _find_changed_base(initialisation: object) -> str | None:
    """Return the name of an initialisation after which the base is another, None for all others."""
    if not isinstance(initialisation, str):
        return None
    value = initialisation.lower()
    for prefix, name in _CHANGED_BASE.items():
        if value.startswith(prefix):
            return name
    return None if value in _PLAIN_INITIALISATIONS else repr(initialisation)
