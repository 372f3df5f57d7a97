"""Configurations of tiny models of real transformers classes: plain and multimodal ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as tf

BASE_ROWS, EXPERT_ROWS = 112, 128
"""Rows of the vocabulary: of most bases, and of all multimodal models."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_UNTIED = {"tie_word_embeddings": False}
_WIDE = {"head_dim": 16, **_UNTIED}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA: dict[str, Any] = {
    **_UNTIED,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
_LLAMA4 = {
    "head_dim": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 64,
}
_GRANITE = {
    "tie_word_embeddings": True,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}
_COHERE = {
    "tie_word_embeddings": True,
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": _ALTERNATING,
    "logit_scale": 0.25,
}

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": _UNTIED,
    "mistral": {**_UNTIED, "sliding_window": None},
    "qwen2": _UNTIED,
    "qwen3": _WIDE,
    "gemma": {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": _ALTERNATING},
    "phi3": _UNTIED,
    "phi": _UNTIED,
    "olmo2": _UNTIED,
    "glm4": _WIDE,
    "granite": _GRANITE,
    "cohere2": _COHERE,
    "smollm3": {"tie_word_embeddings": True},
    "mixtral": {
        **_UNTIED,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {**_UNTIED, **_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_WIDE, **_MOE, "norm_topk_prob": True},
    "qwen3_next": {**_WIDE, **_MOE, **_LINEAR, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_WIDE, **_LINEAR},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, "n_group": 1, "topk_group": 1},
    "llama4_text": _LLAMA4,
    "gpt_oss": {
        **_UNTIED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "intermediate_size": 32,
        "layer_types": _ALTERNATING,
    },
}


@dataclass(frozen=True)
class MultimodalFamily:
    """One multimodal class over a plain language model."""

    class_name: str
    make_config: Callable[[], Any]
    base: str
    """A key of LANGUAGE_MODELS."""
    base_rows: int = EXPERT_ROWS
    modality: str = "image"
    base_values: dict[str, Any] = field(default_factory=dict)
    """Of the base's configuration, where they differ from LANGUAGE_MODELS."""


def _conditional(
    stem: str,
    base: str,
    *,
    base_rows: int = EXPERT_ROWS,
    modality: str = "image",
    base_values: dict[str, Any] | None = None,
    **values: Any,
) -> MultimodalFamily:
    """Return the family of the class STEMForConditionalGeneration with a STEMConfig of `values`."""
    return MultimodalFamily(
        f"{stem}ForConditionalGeneration",
        lambda: getattr(tf, f"{stem}Config")(**values),
        base,
        base_rows,
        modality,
        base_values or {},
    )


def _text(kind: str, **values: Any) -> dict[str, Any]:
    return {
        **SIZES,
        **LANGUAGE_MODELS[kind],
        "vocab_size": EXPERT_ROWS,
        "model_type": kind,
        **values,
    }


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_CLIP = {**_VISION, "projection_dim": 32, "model_type": "clip_vision_model"}
_SIGLIP = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = {**_VISION, "model_type": "pixtral", "image_size": 64}
_AUDIO = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 100,
}
_WHISPER = {
    "num_mel_bins": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_source_positions": 100,
}
_QWEN2_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 64,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN25_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "window_size": 16,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
_QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_QWEN_TOKENS = {
    "vision_start_token_id": 112,
    "vision_end_token_id": 113,
    "image_token_id": 114,
    "video_token_id": 115,
}


def _mrope(sections: list[int], **values: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": sections,
            **values,
        }
    }


def _inner(kind: str, **values: Any) -> dict[str, Any]:
    """Return the text configuration of a class that allows one type of its own."""
    stated = _text(kind, **values)
    del stated["model_type"]
    return stated


_INTERLEAVED = _mrope([3, 3, 2], mrope_interleaved=True)

MULTIMODAL: dict[str, MultimodalFamily] = {
    "LLaVA 1.5": _conditional(
        "Llava",
        "llama",
        base_rows=BASE_ROWS,
        vision_config=_CLIP,
        text_config=_text("llama"),
        image_token_index=112,
    ),
    "LLaVA-NeXT": _conditional(
        "LlavaNext",
        "mistral",
        base_rows=BASE_ROWS,
        vision_config=_CLIP,
        text_config=_text("mistral"),
        image_token_index=112,
        image_grid_pinpoints=_PINPOINTS,
    ),
    "LLaVA-OneVision": _conditional(
        "LlavaOnevision",
        "qwen2",
        base_rows=BASE_ROWS,
        vision_config=_SIGLIP,
        text_config=_text("qwen2"),
        image_token_index=112,
        video_token_index=113,
        image_grid_pinpoints=_PINPOINTS,
    ),
    "Video-LLaVA": _conditional(
        "VideoLlava",
        "llama",
        base_rows=BASE_ROWS,
        modality="video",
        vision_config=_CLIP,
        text_config=_text("llama"),
        image_token_index=112,
        video_token_index=113,
    ),
    "LLaVA-NeXT-Video": _conditional(
        "LlavaNextVideo",
        "llama",
        base_rows=BASE_ROWS,
        modality="video",
        vision_config=_CLIP,
        text_config=_text("llama"),
        image_token_index=112,
        video_token_index=113,
        image_grid_pinpoints=_PINPOINTS,
    ),
    "Qwen2-VL": _conditional(
        "Qwen2VL",
        "qwen2",
        text_config=_inner("qwen2", **_mrope([2, 3, 3])),
        vision_config=_QWEN2_VISION,
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Qwen2.5-VL": _conditional(
        "Qwen2_5_VL",
        "qwen2",
        text_config=_inner("qwen2", **_mrope([2, 3, 3])),
        vision_config=_QWEN25_VISION,
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Qwen3-VL": _conditional(
        "Qwen3VL",
        "qwen3",
        text_config=_inner("qwen3", **_INTERLEAVED),
        vision_config={**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Qwen3-VL-MoE": _conditional(
        "Qwen3VLMoe",
        "qwen3_moe",
        text_config=_inner("qwen3_moe", **_INTERLEAVED),
        vision_config={**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Qwen3.5": _conditional(
        "Qwen3_5",
        "qwen3_5_text",
        text_config=_inner("qwen3_5_text"),
        vision_config=_QWEN3_VISION,
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Qwen2-Audio": _conditional(
        "Qwen2Audio",
        "qwen2",
        modality="audio",
        audio_config=_AUDIO,
        text_config=_text("qwen2"),
        audio_token_index=112,
    ),
    "Qwen2.5-Omni thinker": _conditional(
        "Qwen2_5OmniThinker",
        "qwen2",
        audio_config={**_AUDIO, "n_window": 10, "output_dim": 64},
        vision_config=_QWEN25_VISION,
        text_config=_inner("qwen2", **_mrope([2, 3, 3])),
        tie_word_embeddings=False,
        audio_token_index=116,
        image_token_index=114,
        video_token_index=115,
        vision_start_token_id=112,
        audio_start_token_id=117,
    ),
    "Qwen3-Omni thinker": _conditional(
        "Qwen3OmniMoeThinker",
        "qwen3_moe",
        audio_config={
            **_AUDIO,
            "n_window": 10,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        vision_config={**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
        text_config=_inner("qwen3_moe", **_INTERLEAVED),
        tie_word_embeddings=False,
        audio_token_id=116,
        image_token_id=114,
        video_token_id=115,
        vision_start_token_id=112,
        audio_start_token_id=117,
    ),
    "Audio Flamingo 3": _conditional(
        "AudioFlamingo3",
        "qwen2",
        modality="audio",
        audio_config=_WHISPER,
        text_config=_text("qwen2"),
        audio_token_id=112,
    ),
    "Voxtral": _conditional(
        "Voxtral",
        "llama",
        modality="audio",
        base_values={
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
        },
        audio_config=_WHISPER,
        text_config=_text("llama", head_dim=16),
        audio_token_id=112,
    ),
    "Granite Speech": _conditional(
        "GraniteSpeech",
        "granite",
        modality="audio",
        text_config=_text("granite"),
        encoder_config={
            "input_dim": 160,
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 4,
            "dim_head": 8,
            "output_dim": 8,
            "context_size": 20,
            "max_pos_emb": 32,
            "conv_kernel_size": 3,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
        },
        audio_token_index=112,
        has_lora_adapter=False,
        tie_word_embeddings=True,
    ),
    "InternVL": _conditional(
        "InternVL",
        "qwen2",
        vision_config={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=_text("qwen2"),
        image_token_id=114,
        image_seq_length=4,
        tie_word_embeddings=False,
    ),
    "Idefics3": _conditional(
        "Idefics3",
        "llama",
        base_rows=BASE_ROWS,
        vision_config=_VISION,
        text_config=_text("llama"),
        image_token_id=112,
        scale_factor=2,
        tie_word_embeddings=False,
    ),
    "SmolVLM": _conditional(
        "SmolVLM",
        "llama",
        base_rows=BASE_ROWS,
        vision_config=_VISION,
        text_config=_text("llama"),
        image_token_id=112,
        scale_factor=2,
        tie_word_embeddings=False,
    ),
    "Mistral 3": _conditional(
        "Mistral3",
        "mistral",
        base_values={"head_dim": 16},
        vision_config=_PIXTRAL,
        text_config=_text("mistral", head_dim=16),
        image_token_index=112,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    ),
    "Pixtral": _conditional(
        "Llava",
        "mistral",
        base_values={"head_dim": 16},
        vision_config=_PIXTRAL,
        text_config=_text("mistral", head_dim=16),
        image_token_index=112,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "PaliGemma": _conditional(
        "PaliGemma",
        "gemma",
        base_rows=BASE_ROWS,
        vision_config=_SIGLIP,
        text_config=_text("gemma"),
        image_token_index=112,
        projection_dim=64,
    ),
    "PaliGemma 2": _conditional(
        "PaliGemma",
        "gemma2",
        base_rows=BASE_ROWS,
        vision_config=_SIGLIP,
        text_config=_text("gemma2"),
        image_token_index=112,
        projection_dim=64,
    ),
    "Gemma 3": _conditional(
        "Gemma3",
        "gemma3_text",
        vision_config=_SIGLIP,
        text_config=_text("gemma3_text"),
        mm_tokens_per_image=4,
        image_token_index=112,
        boi_token_index=113,
        eoi_token_index=114,
    ),
    "Aya Vision": _conditional(
        "AyaVision",
        "cohere2",
        vision_config=_SIGLIP,
        text_config=_text("cohere2"),
        image_token_index=115,
        tie_word_embeddings=True,
    ),
    "GLM-4V": _conditional(
        "Glm4v",
        "glm4",
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            "out_hidden_size": 64,
            "intermediate_size": 48,
        },
        text_config=_inner("glm4", **_mrope([1, 2, 1], partial_rotary_factor=0.5)),
        tie_word_embeddings=False,
        image_token_id=114,
        video_token_id=115,
        image_start_token_id=112,
        image_end_token_id=113,
    ),
    "DeepSeek-VL": _conditional(
        "DeepseekVL",
        "llama",
        vision_config=_SIGLIP,
        text_config=_text("llama"),
        image_token_id=112,
        tie_word_embeddings=False,
    ),
    "Kimi K2.5": _conditional(
        "Kimi_K25",
        "deepseek_v3",
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        text_config=_text("deepseek_v3"),
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **_QWEN_TOKENS,
    ),
    "Phi-4 multimodal": MultimodalFamily(
        "Phi4MultimodalForCausalLM",
        lambda: tf.Phi4MultimodalConfig(
            **_inner("phi3"),
            vision_config={**_VISION, "crop_size": 32, "image_token_id": 112},
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 2,
                "num_attention_heads": 4,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "audio_token_id": 113,
            },
        ),
        "phi3",
    ),
    "Mllama": _conditional(
        "Mllama",
        "llama",
        base_rows=BASE_ROWS,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
        },
        text_config={
            **_inner("llama"),
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "vocab_size": EXPERT_ROWS - 8,
        },
        image_token_index=112,
    ),
    "Llama 4": _conditional(
        "Llama4",
        "llama4_text",
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "image_size": 32,
            "patch_size": 8,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=_inner("llama4_text"),
        image_token_index=112,
    ),
}
