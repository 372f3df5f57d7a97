"""Phi-3 and Phi-4: query, key and value in one matrix, gate and up in another, part after part."""

from __future__ import annotations

from mmerge.workers.families.interface import Family, Projection

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    projections=(
        Projection("self_attn.qkv_proj", "query_key_value"),
        Projection("self_attn.o_proj", "attention_output"),
        Projection("mlp.gate_up_proj", "gate_up"),
        Projection("mlp.down_proj", "down"),
    ),
)
