"""Which tensors of an expert count as its language model's though the base lacks them."""

from __future__ import annotations

import pytest

from mmerge.workers.checkpoints.expert_only import find_expert_only
from mmerge.workers.checkpoints.tied_head import is_surely_tied

BASE = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]


def find(names: list[str], prefix: str) -> list[str]:
    return find_expert_only(
        names,
        base_names=[name.replace("model.", prefix, 1) for name in BASE],
        renames=(("lm_head.weight", "language_model.lm_head.weight"), ("model.", prefix)),
    )


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_biases_norms_layers_and_heads_are_found_under_any_prefix(prefix: str) -> None:
    own = [
        "language_model.lm_head.weight",
        f"{prefix}layers.0.self_attn.q_norm.weight",
        f"{prefix}layers.0.self_attn.q_proj.bias",
        f"{prefix}layers.1.mlp.up_proj.weight",
        f"{prefix}norm.bias",
    ]
    shared = [name.replace("model.", prefix, 1) for name in BASE]
    assert find([*own, *shared], prefix) == sorted(own)


def test_encoders_connectors_and_computed_buffers_are_not_found() -> None:
    names = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.mm_projector.0.weight",
        "model.image_newline",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.bias",
        "visual.blocks.0.norm1.weight",
    ]
    assert find(names, "model.") == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_a_head_is_tied_where_no_part_of_the_configuration_denies_it(
    config: dict[str, object], expected: bool
) -> None:
    assert is_surely_tied(config) is expected
