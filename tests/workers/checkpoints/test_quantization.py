"""Quantised checkpoints: scaled float8 has the values that its scales say, the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.safetensors_header import TensorSpec
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.quantization import dequantise, find_grid, without_quantization
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource, identity_digest

WEIGHT = "model.layers.0.mlp.down_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def make_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return Checkpoint(str(folder), owner="expert 'one'")


def make_fp8(shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(100).to(torch.float8_e4m3fn)


def read_values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    source = checkpoint.tensors[name]
    data = read_source(source, stores=OpenStores(), offset=0, num_bytes=source.spec.num_bytes)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.spec.shape)


def expand(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """One scale per entry, by a loop over the entries of one matrix."""
    result = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            result[row, column] = scales[row // block[0], column // block[1]]
    return result


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    ("scale_shape", "block"),
    [((3, 2), (8, 16)), ((), (20, 24)), ((1,), (20, 24)), ((20, 1), (1, 24)), ((20,), (1, 24))],
)
def test_float8_weights_are_multiplied_by_the_scale_of_their_block(
    tmp_path: Path, suffix: str, scale_shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    weights = make_fp8((20, 24))
    scales = torch.rand(scale_shape) + 0.01
    checkpoint = make_checkpoint(
        tmp_path,
        {WEIGHT: weights, WEIGHT + suffix: scales},
        quantization_config={"quant_method": "fp8", "weight_block_size": [8, 16]},
    )
    grid = scales.reshape(-(-20 // block[0]), -(-24 // block[1]))
    expected = weights.to(torch.float32) * expand(grid, block, (20, 24))
    assert list(checkpoint.tensors) == [WEIGHT]
    assert torch.equal(read_values(checkpoint, WEIGHT), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_may_have_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, scales = make_fp8((4, 4)), torch.tensor([[0.25]]).to(dtype)
    tensors = {WEIGHT: weights, WEIGHT + "_scale_inv": scales}
    checkpoint = make_checkpoint(tmp_path, tensors, quantization_config=FP8)
    assert torch.equal(read_values(checkpoint, WEIGHT), weights.to(torch.float32) * 0.25)


def test_any_rows_and_ranges_of_scaled_weights_have_the_same_bits(tmp_path: Path) -> None:
    weights, scales = make_fp8((3, 20, 24)), torch.rand((3, 3, 2)) + 0.01
    name = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = make_checkpoint(
        tmp_path,
        {name: weights, name + "_scale_inv": scales},
        quantization_config={"quant_method": "fp8", "weight_block_size": [8, 16]},
    )
    whole = read_values(checkpoint, name)
    for index in range(3):
        expected = weights[index].to(torch.float32) * expand(scales[index], (8, 16), (20, 24))
        assert torch.equal(whole[index], expected)
    source, stores = checkpoint.tensors[name], OpenStores()
    rows = source.to_rows(1, 3).to_rows(1, 2)
    for start, stop in ((0, 480), (0, 1), (7, 30), (23, 25), (479, 480)):
        data = read_source(rows, stores=stores, offset=4 * start, num_bytes=4 * (stop - start))
        part = torch.frombuffer(bytearray(data), dtype=torch.float32)
        assert torch.equal(part, whole[2].reshape(-1)[start:stop])


def test_replaced_scales_change_the_identity_of_the_weights(tmp_path: Path) -> None:
    tensors = {WEIGHT: make_fp8((4, 4)), WEIGHT + "_scale": torch.ones(1)}
    source = make_checkpoint(tmp_path, tensors).tensors[WEIGHT]
    digests = {
        identity_digest({str(tmp_path): {"model.safetensors": identity}}, source)
        for identity in ("before", "after")
    }
    assert len(digests) == 2
    assert identity_digest(
        {str(tmp_path): {"model.safetensors": "before"}}, source.to_rows(0, 2)
    ) != identity_digest({str(tmp_path): {"model.safetensors": "before"}}, source.to_rows(2, 4))


def test_scales_of_activations_are_left_out_and_other_parameters_stay(tmp_path: Path) -> None:
    module = WEIGHT.removesuffix(".weight")
    tensors = {
        WEIGHT: make_fp8((4, 4)),
        WEIGHT + "_scale": torch.ones(1),
        module + ".input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.logit_scale": torch.ones(1),
        "model.layer_scale.weight": torch.ones(4),
    }
    found = make_checkpoint(tmp_path, tensors, quantization_config=FP8).tensors
    assert list(found) == ["model.layer_scale.weight", WEIGHT, "model.logit_scale"]


def test_the_configuration_that_travels_says_nothing_of_quantisation(tmp_path: Path) -> None:
    tensors = {WEIGHT: make_fp8((4, 4)), WEIGHT + "_scale": torch.ones(1)}
    nested = {"model_type": "llama", "quantization_config": FP8}
    checkpoint = make_checkpoint(
        tmp_path, tensors, quantization_config=FP8, text_config=nested, hidden_size=4
    )
    assert json.loads(checkpoint.read_small_files()["config.json"]) == {
        "model_type": "llama",
        "hidden_size": 4,
        "text_config": {"model_type": "llama"},
    }
    assert without_quantization({"a": 1}) == {"a": 1}


def test_a_plain_configuration_travels_byte_for_byte(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, {WEIGHT: torch.ones(2, 2)})
    text = (tmp_path / "config.json").read_bytes()
    assert checkpoint.read_small_files()["config.json"] == text


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "tomorrow"}, "tomorrow"),
        ({}, "an unnamed method"),
    ],
)
@pytest.mark.parametrize("part", ["", "text_config"])
def test_a_method_that_is_not_read_is_refused_by_its_name(
    tmp_path: Path, method: dict[str, Any], name: str, part: str
) -> None:
    config: dict[str, Any] = {"quantization_config": method}
    checkpoint = make_checkpoint(
        tmp_path, {WEIGHT: torch.ones(2, 2)}, **({part: config} if part else config)
    )
    with pytest.raises(CheckpointError, match=rf"'one'.* quantised with {name}\b.*dequantise it"):
        _ = checkpoint.tensors


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["qweight", "qzeros", "scales"], "GPTQ or AWQ"),
        (["weight", "weight.absmax", "weight.quant_map"], "bitsandbytes"),
        (["weight", "weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["weight", "SCB"], "bitsandbytes"),
        (["weight_packed", "weight_scale", "weight_shape"], "compressed-tensors"),
        (["weight", "weight_scale", "weight_scale_2"], "NVFP4"),
        (["gate_up_proj_blocks", "gate_up_proj_scales"], "MXFP4"),
        (["W_q", "meta"], "HQQ"),
        (["weight", "weight_scale"], "an unknown method"),
        (["weight", "weight_scale_inv"], "an unknown method"),
    ],
)
def test_quantised_tensors_are_recognised_without_a_configuration(
    tmp_path: Path, names: list[str], method: str
) -> None:
    module = WEIGHT.removesuffix("weight")
    tensors = {module + name: torch.ones((2, 2), dtype=torch.uint8) for name in names}
    with pytest.raises(CheckpointError, match=method):
        _ = make_checkpoint(tmp_path, tensors).tensors


def test_names_that_only_look_like_blocks_or_scales_are_kept(tmp_path: Path) -> None:
    names = ["visual.blocks", "visual.attn_blocks", "audio.codebooks", "vit.layer_scale1.lambda1"]
    tensors = {name: torch.ones(2) for name in [*names, "visual.logit_scale"]}
    assert set(make_checkpoint(tmp_path, tensors).tensors) == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({WEIGHT: make_fp8((4, 4))}, {"quantization_config": FP8}, f"has no {WEIGHT}_scale_inv"),
        (
            {WEIGHT: make_fp8((4, 4)), WEIGHT + "_scale": torch.ones(2, 3)},
            {"quantization_config": FP8},
            r"\(4, 4\), its scales .* have \(2, 3\)",
        ),
        (
            {WEIGHT: make_fp8((192, 4)), WEIGHT + "_scale_inv": torch.ones(2, 1)},
            {},
            "no weight_block_size",
        ),
        (
            {WEIGHT: make_fp8((4, 4)), WEIGHT + "_scale": torch.ones(1, dtype=torch.uint8)},
            {"quantization_config": FP8},
            "has dtype U8",
        ),
        (
            {WEIGHT: make_fp8((4, 4)), WEIGHT + "_scale": torch.ones(1)},
            {"quantization_config": FP8 | {"weight_block_size": [128]}},
            "no pair of sizes",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    checkpoint = make_checkpoint(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.tensors


def test_blocks_without_a_configuration_are_taken_only_where_they_are_certain() -> None:
    grid = find_grid((256, 384), (2, 3), None)
    assert grid is not None
    assert grid.block == (128, 128)
    assert find_grid((200, 128), (2, 1), None) is None
    with_edge = find_grid((200, 128), (2, 1), (128, 128))
    assert with_edge is not None
    assert with_edge.block == (128, 128)


def test_plain_float8_without_a_word_of_quantisation_is_read_as_it_is() -> None:
    spec = TensorSpec(WEIGHT, "F8_E4M3", (2, 2), 0, 4)
    tensors = {WEIGHT: TensorSource("folder", "model.safetensors", spec)}
    assert dequantise(tensors, {}, where="base: folder") == tensors


@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_of_gguf_files_is_named_as_one(tmp_path: Path, has_config: bool) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"GGUF \(model-Q4_K_M.gguf\)"):
        _ = Checkpoint(str(tmp_path), owner="base").tensors
