"""GPT-NeoX and Pythia: fused query, key and value, interleaved head by head; biases everywhere."""

from __future__ import annotations

from mmerge.workers.families.interface import Family, Projection

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    projections=(
        Projection("attention.query_key_value", "query_key_value", is_interleaved=True),
        Projection("attention.dense", "attention_output"),
        Projection("mlp.dense_h_to_4h", "up"),
        Projection("mlp.dense_4h_to_h", "down"),
    ),
    embedding="embed_in.weight",
    head="embed_out.weight",
    final_norm="final_layer_norm",
    body="gpt_neox.",
    # transformers 5 calls the head lm_head in its class, and embed_out in the files it writes.
    parameter_renames=(("embed_out.weight", "lm_head.weight"),),
)
