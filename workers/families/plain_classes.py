"""Configurations of the language models inside multimodal classes, for their plain classes.

The language model of Qwen2-VL has a configuration type of its own, for which transformers has no
causal language model. It computes text as Qwen2 does, and loads as Qwen2.
"""

from __future__ import annotations

from typing import Any

PLAIN_TYPES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
}
"""Types of text configurations, and of the plain language models that compute text alike.

What the multimodal class does beyond text is not theirs: positions of three dimensions, embeddings
added behind single layers. A comparison with the class itself finds where they differ.
"""
_FIXED: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
"""What a multimodal class always does and its plain class does if its configuration says so."""
_MROPE_KEYS = ("mrope_section", "mrope_interleaved", "type")
_IDENTITY_KEYS = ("model_type", "architectures", "transformers_version")


def to_plain_config(text: Any) -> Any:
    """Return a text configuration of transformers as that of its plain class, or as it is."""
    plain_type = PLAIN_TYPES.get(text.model_type)
    if plain_type is None:
        return text
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain_class = CONFIG_MAPPING[plain_type]
    names = {*plain_class().to_dict(), *plain_class.attribute_map} - set(_IDENTITY_KEYS)
    values = {key: value for key, value in text.to_dict().items() if key in names}
    values |= _FIXED.get(text.model_type, {})
    # Classes that do not state the width of a head divide; plain ones have defaults of their own.
    heads = text.num_attention_heads
    values["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    values["rope_parameters"] = _without_sections(values.get("rope_parameters"))
    return plain_class.from_dict(values)


def _without_sections(rope: Any) -> Any:
    """Return rotary parameters without those of three-dimensional positions."""
    if not isinstance(rope, dict):
        return rope
    plain = {key: value for key, value in rope.items() if key not in _MROPE_KEYS}
    if plain.get("rope_type") == "mrope":
        plain["rope_type"] = "default"
    return plain
