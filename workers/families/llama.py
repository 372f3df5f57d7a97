"""LLaMA and all models with its tensor names: Mistral, Qwen2, Qwen3, Gemma, Granite, OLMo, …"""

from __future__ import annotations

from mmerge.workers.families.interface import Family, Projection

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    projections=(
        Projection("self_attn.q_proj", "query"),
        Projection("self_attn.k_proj", "key"),
        Projection("self_attn.v_proj", "value"),
        Projection("self_attn.o_proj", "attention_output"),
        Projection("mlp.gate_proj", "gate"),
        Projection("mlp.up_proj", "up"),
        Projection("mlp.down_proj", "down"),
    ),
)
