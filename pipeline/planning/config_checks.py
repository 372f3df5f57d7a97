"""Comparison of the language models' configurations: sizes must agree, the rest is said.

Tensors of equal names and shapes can belong to models that compute differently: another rotary
table, norm epsilon or activation. One merged model has one of each, the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.families.text_config import resolve_text_config

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Sizes that shapes alone do not tell, or tell less clearly."""
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
_DEFAULTED = (*_SIZES, *_ROPE_KEYS, "rms_norm_eps", "layer_norm_eps", "hidden_act")
"""Keys whose absence means the class's default, which decides a result."""
_WITHOUT_EFFECT = {
    # Of no effect on what a tensor means.
    *("architectures", "auto_map", "model_type", "name_or_path", "transformers_version"),
    *(
        "dtype",
        "torch_dtype",
        "use_cache",
        "pretraining_tp",
        "initializer_range",
        "initializer_std",
    ),
    *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "quantization_config", "router_aux_loss_coef"),
    # Used in training alone.
    *("attention_dropout", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout", "dropout", "classifier_dropout", "router_jitter_noise"),
    # Compared otherwise: rows of the embedding, tokens, heads, biases, kinds of layers.
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "bias", "use_bias", "max_window_layers"),
    *("cross_attention_layers", "vision_config", "audio_config", "text_config"),
}


def check_sizes(base: Checkpoint, expert: Checkpoint, *, ignores_layers: bool = False) -> None:
    """Raise CheckpointError where the sizes of two language models differ.

    `ignores_layers` leaves out the number of their layers.
    """
    ours, theirs = _comparable(base, expert)
    # Its layers are matched around those of cross-attention, and missing ones are errors.
    ignores_layers |= "cross_attention_layers" in theirs or "cross_attention_layers" in ours
    for key in _SIZES:
        if key == "num_hidden_layers" and ignores_layers:
            continue
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise CheckpointError(
                f"{expert.owner}: its language model has {key} {theirs[key]!r}, the base has"
                f" {ours[key]!r}. Experts must be tuned from the base"
            )


def list_config_warnings(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Return what differs in how two language models of equal sizes compute, one line each."""
    ours, theirs = _comparable(base, expert)
    warnings = []
    types = base.text_config.get("model_type"), expert.text_config.get("model_type")
    if None not in types and types[0] != types[1]:
        warnings.append(
            f"{expert.owner}: its language model is of type {types[1]!r}, the base of type"
            f" {types[0]!r}; names and shapes of their tensors agree"
        )
    for key, our_value, their_value in _differences(ours, theirs):
        warnings.append(
            f"{expert.owner}: {key} is {_show(their_value)}, in the base {_show(our_value)}."
            " A merged model has the base's"
        )
    return warnings


def list_config_differences(base: Checkpoint, expert: Checkpoint) -> list[tuple[str, str, str]]:
    """Return (key, base's value, expert's value) of all that differs, sizes that refuse included.

    Raises:
        CheckpointError: a configuration cannot be read.
    """
    ours, theirs = _comparable(base, expert)
    types = base.text_config.get("model_type"), expert.text_config.get("model_type")
    rows = [("model_type of the language model", *types)] if types[0] != types[1] else []
    rows += [
        (key, ours.get(key), theirs.get(key))
        for key in _SIZES
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]
    rows += _differences(ours, theirs)
    return [(key, _show(our_value), _show(their_value)) for key, our_value, their_value in rows]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, base's value, expert's value) of all keys that change results."""
    skipped = {*_WITHOUT_EFFECT, *_SIZES, *_ROPE_KEYS}
    keys = [key for key in ours if key in theirs and key not in skipped and key[0] != "_"]
    differing = [(key, ours[key], theirs[key]) for key in sorted(keys) if ours[key] != theirs[key]]
    our_rope, their_rope = _rope(ours), _rope(theirs)
    for key in sorted({*our_rope, *their_rope}):
        values = our_rope.get(key), their_rope.get(key)
        if values[0] != values[1] and not (key == "rope_theta" and None in values):
            differing.append((f"rope: {key}", *values))
    return differing


def _comparable(base: Checkpoint, expert: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both text configurations without nulls, with class defaults where one lacks a value.

    Reading the defaults imports transformers, so it is done only where it matters.
    """
    ours, theirs = _stated_values(base), _stated_values(expert)
    if any((key in ours) != (key in theirs) for key in _DEFAULTED):
        return _resolved_values(base), _resolved_values(expert)
    return ours, theirs


def _resolved_values(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return resolve_text_config(checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.owner}: {Exception.__str__(error)}") from error


def _stated_values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.text_config.items() if value is not None}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of a configuration in one form, whatever wrote it."""
    settings: dict[str, Any] = {"rope_type": "default"}
    for key in ("rope_scaling", "rope_parameters"):
        stated = values.get(key)
        if isinstance(stated, dict):
            settings |= {("rope_type" if name == "type" else name): v for name, v in stated.items()}
    if "rope_theta" in values:
        settings["rope_theta"] = values["rope_theta"]
    # Multimodal rotary tables of one position per token are the default ones.
    if settings["rope_type"] == "mrope":
        settings["rope_type"] = "default"
    return settings


def _show(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
