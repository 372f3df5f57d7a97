"""Neurons of layers whose projections are fused, have no gate, or are called otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import build, write_family
from safetensors.torch import load_file

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.methods import neurons
from mmerge.workers.reconstruction.build_reader import BuildReader


def test_an_ffn_without_gate_has_the_rows_of_up_and_the_columns_of_down() -> None:
    shapes = {
        "model.layers.0.mlp.c_fc.weight": (6, 4),
        "model.layers.0.mlp.c_fc.bias": (6,),
        "model.layers.0.mlp.c_proj.weight": (4, 6),
        "model.layers.0.mlp.c_proj.bias": (4,),
    }
    group = neurons.feed_forward_group(shapes)
    assert group is not None
    parts = [(part.name.split("mlp.")[1], part.axis, part.neurons.tolist()) for part in group.parts]
    assert parts == [
        ("c_fc.weight", 0, [0, 1, 2, 3, 4, 5]),
        ("c_fc.bias", 0, [0, 1, 2, 3, 4, 5]),
        ("c_proj.weight", 1, [0, 1, 2, 3, 4, 5]),
    ]


def test_a_neuron_has_its_row_in_both_halves_of_a_fused_gate_and_up() -> None:
    shapes = {
        "model.layers.0.mlp.gate_up_proj.weight": (6, 4),
        "model.layers.0.mlp.down_proj.weight": (4, 3),
    }
    group = neurons.feed_forward_group(shapes)
    assert group is not None
    assert [part.neurons.tolist() for part in group.parts] == [[0, 1, 2, 0, 1, 2], [0, 1, 2]]


def test_fused_attention_rows_follow_each_other_or_are_interleaved_by_head() -> None:
    in_order = neurons.attention_group(
        {
            "model.layers.0.self_attn.qkv_proj.weight": (16, 8),
            "model.layers.0.self_attn.o_proj.weight": (8, 8),
        },
        head_dim=2,
        with_query_key=True,
    )
    assert in_order is not None
    rows = {part.axis: part.neurons.tolist() for part in in_order.parts}
    query = [0, 1, 0, 1, 2, 3, 2, 3]
    assert rows == {1: query, 0: [*query, 0, 1, 2, 3, 0, 1, 2, 3]}
    interleaved = neurons.attention_group(
        {
            "gpt_neox.layers.0.attention.query_key_value.weight": (12, 4),
            "gpt_neox.layers.0.attention.query_key_value.bias": (12,),
            "gpt_neox.layers.0.attention.dense.weight": (4, 4),
        },
        head_dim=2,
        with_query_key=True,
    )
    assert interleaved is not None
    by_name = {part.name.split("attention.")[1]: part.neurons for part in interleaved.parts}
    fused = [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert by_name["query_key_value.weight"].tolist() == fused
    assert by_name["query_key_value.bias"].tolist() == fused
    assert by_name["dense.weight"].tolist() == [0, 1, 2, 3]


def test_neuron_fusion_keeps_whole_neurons_of_an_ffn_without_gate(tmp_path: Path) -> None:
    write_family(tmp_path, "starcoder2", experts=("image",))
    experts = {"image": {"path": "image", "modality": "image"}}
    uri = build(tmp_path, {"method": "neuron_fusion", "keep_ratio": 0.25, "experts": experts})
    reader = BuildReader(uri)
    base = load_file(tmp_path / "base" / "model.safetensors")
    expert = load_file(tmp_path / "image" / "model.safetensors")
    up, down = (f"model.layers.1.mlp.{name}.weight" for name in ("c_fc", "c_proj"))
    bias = "model.layers.1.mlp.c_fc.bias"
    squares = (
        (expert[up] - base[up]).double().square().sum(1)
        + (expert[bias] - base[bias]).double().square()
        + (expert[down] - base[down]).double().square().sum(0)
    )
    kept = squares >= squares.sort(descending=True).values[12 - 1]
    expected = torch.where(kept[:, None], expert[up], base[up])
    torch.testing.assert_close(reader.read(up, "merged"), expected, rtol=1e-6, atol=1e-6)
    expected = torch.where(kept[None, :], expert[down], base[down])
    torch.testing.assert_close(reader.read(down, "merged"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gpt_neox", r"layers\.0\.attention\.query_key_value\.weight.*Say 'query_key: neuron'"),
        ("opt", r"model\.decoder\.layers\.0\..*no model family knows this matrix"),
    ],
)
def test_neuron_fusion_refuses_neurons_that_it_cannot_tell(
    tmp_path: Path, architecture: str, message: str
) -> None:
    write_family(tmp_path, architecture, experts=("image",))
    experts = {"image": {"path": "image", "modality": "image"}}
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path, {"method": "neuron_fusion", "experts": experts})


def test_adamms_refuses_an_embedding_that_it_cannot_tell(tmp_path: Path) -> None:
    write_family(tmp_path, "opt", experts=("image", "audio"))
    experts = {name: {"path": name, "modality": name} for name in ("image", "audio")}
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight: no model family knows"):
        build(tmp_path, {"method": "adamms", "alpha": 0.5, "experts": experts})
