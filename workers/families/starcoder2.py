"""Starcoder2: LLaMA's names, but an MLP of two matrices (c_fc, c_proj), and biases everywhere."""

from __future__ import annotations

from mmerge.workers.families.interface import Family, Projection

STARCODER2 = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    projections=(
        Projection("self_attn.q_proj", "query"),
        Projection("self_attn.k_proj", "key"),
        Projection("self_attn.v_proj", "value"),
        Projection("self_attn.o_proj", "attention_output"),
        Projection("mlp.c_fc", "up"),
        Projection("mlp.c_proj", "down"),
    ),
)
