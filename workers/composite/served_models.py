"""Which multimodal classes a composite serves.

A class whose decoder needs what the base's has no place for (states of an encoder, weights of its
own for images) would load and answer wrongly, so it is refused by name. Its builds are right: every
expert can be exported and run as its own class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.workers.families.registry import is_multimodal_config
from mmerge.workers.modalities.encoders import has_registered_encoder
from mmerge.workers.modalities.small_files import read_config
from mmerge.workers.reconstruction.language_reader import LanguageReader

_LAYER_INPUTS = "its decoder takes token ids besides, for embeddings of single layers"
_CROSS = "its decoder attends to the encoder's states in layers of its own (cross-attention)"
_ADAPTERS = "its decoder uses other weights for tokens of an image or sound (LoRA)"
COMPARED = {
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("qwen2_audio", "audioflamingo3", "voxtral", "granite_speech"),
    *("internvl", "idefics3", "smolvlm", "mistral3", "deepseek_vl"),
    *("gemma3", "paligemma", "aya_vision", "llama4"),
}
"""Model types of which a test compares logits and generated tokens with those of their class."""
REASONS = {"gemma3n": _LAYER_INPUTS, "mllama": _CROSS, "phi4_multimodal": _ADAPTERS}
"""What a composite leaves out of a model type."""
_NEEDS_CLASS = {
    *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_thinker", "glm4v", "glm4v_moe"),
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_omni_moe", "qwen3_omni_moe_thinker", "gemma3", "paligemma"),
}
"""Model types whose decoder takes more of an input than a registered encoder returns."""
_EMBEDS_ALONE = (
    "its decoder takes positions or masks besides embeddings, which its own encoder gives"
)
_UNPROVED = "what its class gives its decoder besides embeddings has not been compared yet"


def refuse_unserved(
    reader: LanguageReader, expert: str | None, *, is_compared: bool = False
) -> None:
    """Raise CheckpointError where a composite would not answer as an expert's own class does.

    Args:
        reader: the build.
        expert: the one whose weights are loaded; None for all of them.
        is_compared: whether each expert is compared with its class when it is loaded.
    """
    base = reader.base_config
    reason = find_reason(base, is_compared=is_compared)
    if reason:
        raise CheckpointError(
            f"{reader.uri}: the base is of type {base['model_type']!r}: {reason}, and a composite"
            " has no place for that, so it would answer wrongly. Write an ordinary"
            f" checkpoint, mmerge export {reader.uri} --to DIR, and load it with transformers"
        )
    for name in [expert] if expert else reader.expert_names:
        record = reader.manifest.to_expert(name)
        config = _read_config(reader, record.files, owner=f"expert {name!r}")
        is_own_encoder = not has_registered_encoder(record.modality)
        reason = find_reason(config, is_own_encoder=is_own_encoder, is_compared=is_compared)
        if reason:
            raise CheckpointError(
                f"{reader.uri}: expert {name!r} is of type {config['model_type']!r}: {reason}, and"
                " a composite has no place for that, so it would answer wrongly."
                " Plans, runs and exports are right: use that expert as its own class,"
                f" mmerge export {reader.uri} --expert {name} --to DIR"
            )


def find_reason(
    config: Mapping[str, Any], *, is_own_encoder: bool = True, is_compared: bool = False
) -> str:
    """Return why a composite cannot serve an expert, empty if it can.

    Args:
        config: its config.json.
        is_own_encoder: whether the class's own encoder is used, not one that a user registered.
        is_compared: whether the expert is compared with its class when it is loaded.
    """
    model_type = str(config.get("model_type", ""))
    if model_type in REASONS:
        return REASONS[model_type]
    if model_type in _NEEDS_CLASS and not is_own_encoder:
        return _EMBEDS_ALONE
    is_safe = model_type in COMPARED or is_compared or not is_own_encoder
    if is_safe or not is_multimodal_config(config):
        return ""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Types that transformers does not know are refused by the loader of encoders.
    return _UNPROVED if model_type in CONFIG_MAPPING else ""


def _read_config(
    reader: LanguageReader, files: tuple[FileEntry, ...], *, owner: str
) -> dict[str, Any]:
    entry = next((file for file in files if file.name == "config.json"), None)
    return read_config(read_file(reader.store, entry), owner=owner) if entry else {}
