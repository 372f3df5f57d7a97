"""Plans of placement: their numbers are those of what is then loaded, and what does not fit is
refused with them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_masks
from rank_script import held_bytes

from mmerge.manifests.errors import PlacementError
from mmerge.pipeline import load_composite
from mmerge.workers.composite.placement import parse_devices
from mmerge.workers.composite.placement_planner import plan_placement
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.families.llama import LLAMA
from mmerge.workers.reconstruction.build_reader import BuildReader

GB = 10**9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x80", [80 * GB] * 4),
        ("24", [24 * GB]),
        ("2x80,1x40GB", [80 * GB, 80 * GB, 40 * GB]),
        ("0.5", [GB // 2]),
    ],
)
def test_devices_are_a_count_and_gigabytes(text: str, expected: list[int]) -> None:
    assert parse_devices(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x80", "4x", "0x80", "4x0", "four", "4x80,,", "-1x80", "9999x80"]
)
def test_other_texts_are_no_devices(text: str) -> None:
    with pytest.raises(PlacementError, match="expected devices as COUNTxGB"):
        parse_devices(text)


@pytest.mark.parametrize("policy", ["packed", "resident"])
def test_planned_bytes_are_those_of_the_loaded_model(lab_store: str, policy: Any) -> None:
    uri = f"{lab_store}#mmer"
    memory = plan_placement(uri, devices=[GB], policy=policy, device_type="cpu").stages[0].memory
    planned = memory.weights + memory.task_vector + memory.masks + memory.modalities
    held = held_bytes(load_composite(uri, policy=policy))
    assert planned == pytest.approx(held, rel=0.001)  # the rotary frequencies are in no checkpoint
    assert memory.encoders > 0


def test_every_rank_of_a_plan_by_tensor_holds_near_one_nth(lab_store: str) -> None:
    whole = plan_placement(f"{lab_store}#mmer", devices=[GB], device_type="cpu").stages[0].memory
    placement = plan_placement(
        f"{lab_store}#mmer", devices=[GB] * 4, by="tensor", device_type="cpu"
    )
    assert placement.num_ranks == 4
    for stage in placement.stages:
        assert stage.memory.weights < 1.2 * whole.weights / 4 + 1e5
        assert stage.memory.task_vector == pytest.approx(whole.task_vector / 4, rel=0.2)
    assert sum(stage.memory.encoders for stage in placement.stages) == whole.encoders


def test_a_plan_by_layers_gives_each_device_a_run_of_layers_and_every_tensor_one_device(
    lab_store: str,
) -> None:
    uri = f"{lab_store}#mmer"
    placement = plan_placement(uri, devices=[GB, GB, GB], by="layers", device_type="cpu")
    assert [stage.first_layer for stage in placement.stages[1:]] == [
        stage.last_layer + 1 for stage in placement.stages[:-1]
    ]
    for name in BuildReader(uri).llm_names():
        assert sum(stage.holds(name) for stage in placement.stages) == 1
    with pytest.raises(PlacementError, match="5 devices for 4 layers"):
        plan_placement(uri, devices=[GB] * 5, by="layers", device_type="cpu")


def test_a_smaller_device_gets_fewer_layers(lab_store: str) -> None:
    placement = plan_placement(
        f"{lab_store}#mmer",
        devices=[400 * 10**6, 100 * 10**6],
        by="layers",
        device_type="cpu",
        context=64,
    )
    first, second = placement.stages
    assert first.last_layer - first.first_layer > second.last_layer - second.first_layer


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_would_do(lab_store: str) -> None:
    with pytest.raises(PlacementError) as caught:
        plan_placement(f"{lab_store}#mmer", devices=[GB], policy="packed")
    message = str(caught.value)
    assert "does not fit (512 tokens, 1 at once, policy 'packed')" in message
    assert re.search(r"cuda:0: 1\.0\d+ GB of 1\.0000 GB, does not fit", message)
    assert "weights 0.0" in message
    assert "reserve 1.0" in message
    with pytest.raises(PlacementError, match=r"2 devices of 0\.01 GB would do, by tensor"):
        plan_placement(f"{lab_store}#mmer", devices=[10**7], device_type="cpu", batch=4)
    with pytest.raises(PlacementError, match="Even 64 devices"):
        plan_placement(f"{lab_store}#mmer", devices=[10**6], device_type="cpu")
    with pytest.raises(
        PlacementError, match="a context of 9999 tokens was asked for, the model takes 512"
    ):
        plan_placement(f"{lab_store}#mmer", devices=[GB], context=9999)
    with pytest.raises(PlacementError, match="by tensor every device gets the same"):
        plan_placement(f"{lab_store}#mmer", devices=[GB, 2 * GB], by="tensor")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_layers_spread_over_stages_give_the_same_logits(tmp_path: Path, architecture: str) -> None:
    uri = build_masks(tmp_path, architecture)
    placement = plan_placement(uri, devices=[GB, GB], by="layers", device_type="cpu")
    assert [(stage.first_layer, stage.last_layer) for stage in placement.stages] == [(0, 0), (1, 1)]
    embeds, ids = load_composite(uri).embed(parts := _parts())
    spread = load_composite(uri, placement=placement)
    torch.testing.assert_close(spread.logits(parts), load_composite(uri).logits(parts))
    # Every layer of a stage, and what stands behind the last, has its inputs brought to the device.
    decoder = spread.language_model.get_decoder()
    assert all(
        len(layer._forward_pre_hooks) == 1
        for layer in [*decoder.layers, decoder.norm, spread.language_model.lm_head]
    )
    assert len(embeds) == len(ids)


def _parts() -> list[Any]:
    from mmerge.pipeline import Part

    return [
        Part.text("w5"),
        Part("image", torch.randn(4, 32, generator=torch.Generator().manual_seed(0))),
        Part.text("w6 w7"),
    ]


def test_a_70b_shape_is_divided_over_eight_ranks_evenly() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    plan = TensorParallelPlan.from_config(config, family=LLAMA, num_ranks=8)
    total = 0
    for name, shape in {
        "self_attn.q_proj": (8192, 8192),
        "self_attn.k_proj": (1024, 8192),
        "mlp.down_proj": (8192, 28672),
        "embed_tokens": (128256, 8192),
    }.items():
        parts = [
            plan.part_of(f"model.layers.0.{name}.weight", shape, rank=rank) for rank in range(8)
        ]
        size = shape[1] if parts[0].along == "columns" else shape[0]
        assert [part.start for part in parts] == [size // 8 * rank for rank in range(8)]
        total += sum(part.size for part in parts) == size
    assert total == 4


def test_a_matrix_that_nobody_knows_how_to_cut_is_refused_by_name(lab_store: str) -> None:
    plan = TensorParallelPlan(2, 4, 2, 32, 256, LLAMA)
    with pytest.raises(
        PlacementError,
        match=(
            r"model.layers.0.self_attn.qkv_proj.weight \(8, 8\): model family 'llama' has no"
            r" tensor-parallel rule for this matrix"
        ),
    ):
        plan.part_of("model.layers.0.self_attn.qkv_proj.weight", (8, 8), rank=0)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    with pytest.raises(
        PlacementError,
        match=r"device 'banana': torch knows no such device. Take cpu, cuda or cuda:1",
    ):
        load_composite("nowhere", device="banana")
    number = torch.cuda.device_count()
    message = (
        "has .* numbered from 0"
        if number
        else "finds no CUDA GPU in this process. Take --device cpu"
    )
    with pytest.raises(PlacementError, match=f"device 'cuda:{number}': .*{message}"):
        load_composite("nowhere", device=f"cuda:{number}")
