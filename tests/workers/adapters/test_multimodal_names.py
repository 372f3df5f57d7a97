"""Adapters of multimodal models are placed whole, under every name that their modules have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmerge.workers.adapters.checkpoint import open_expert
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource
from tests.model_configs import MULTIMODAL
from tests.model_families import make_multimodal

PREFIX = "base_model.model."
TARGETS = {"Qwen3-Omni thinker": ["q_proj", "o_proj", "qkv", "fc1"]}
"""Families of which PEFT cannot adapt every Linear layer, and which it adapts."""
FAMILIES = sorted(set(MULTIMODAL) - {"Kimi K2.5"})
"""All that can be a base."""


OLDER_NAMES = (
    "LLaVA 1.5",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Gemma 3",
    "InternVL",
    "Mllama",
    "Qwen2-Audio",
)
"""Families whose files have the names of earlier classes."""


def read_values(source: TensorSource) -> torch.Tensor:
    data = read_source(source, stores=OpenStores(), offset=0, num_bytes=source.spec.num_bytes)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.spec.shape)


def write_adapter(folder: Path, model: Any, family: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    settings = {"target_modules": TARGETS.get(family, "all-linear")} | settings
    config = peft.LoraConfig(r=2, lora_alpha=6, **settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def to_stored_names(adapter: Path, base: dict[str, torch.Tensor], merged: dict[str, Any]) -> None:
    """Rename an adapter's modules as the base's files call them: the names of older classes."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    renamed = {}
    for module in modules:
        a, b = (tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        delta = 3 * b @ a
        stored = next(
            name
            for name in changed
            if merged[name].shape == delta.shape
            and torch.allclose(merged[name] - base[name], delta, atol=1e-5)
        )
        path = PREFIX + stored.removesuffix(".weight")
        renamed |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    assert len(renamed) == len(tensors)
    save_file(renamed, file)


def compare(expert: Checkpoint, base: Checkpoint, *, folder: Path) -> None:
    """Check that an expert's tensors are those that PEFT merged, within 2e-6 of the largest."""
    start = load_file(folder / "base" / "model.safetensors")
    expected = load_file(folder / "merged" / "model.safetensors")
    assert expert.tensors.keys() == expected.keys()
    for name, value in expected.items():
        if torch.equal(value, start[name]):
            assert expert.tensors[name] == base.tensors[name]
            continue
        difference = (read_values(expert.tensors[name]) - value).abs().max()
        assert difference <= 2e-6 * value.abs().max(), name


@pytest.mark.parametrize(
    ("family", "names"),
    [(family, "in memory") for family in FAMILIES]
    + [(family, "in files") for family in OLDER_NAMES]
    + [("LLaVA 1.5", "with the adapter's name")],
)
def test_an_adapter_of_a_multimodal_model_is_placed_whole(
    tmp_path: Path, family: str, names: str
) -> None:
    model = make_multimodal(MULTIMODAL[family], seed=5)
    model.save_pretrained(tmp_path / "base")
    adapted = write_adapter(tmp_path / "adapter", model, family)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    start = load_file(tmp_path / "base" / "model.safetensors")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    if names == "in files":
        to_stored_names(tmp_path / "adapter", start, expected)
    elif names == "with the adapter's name":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = {
            name.replace(".weight", ".default.weight"): value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file)
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    expert = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)
    compare(expert, base, folder=tmp_path)


PARTS = {
    "experts that files hold transposed": (
        "Qwen3-VL-MoE",
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "target_modules": [],
        },
    ),
    "experts that files hold one by one": (
        "Qwen3-Omni thinker",
        {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]},
    ),
    "a convolution": ("LLaVA 1.5", {"target_modules": ["patch_embedding", "linear_1"]}),
    "a convolution with DoRA": (
        "LLaVA 1.5",
        {"target_modules": ["patch_embedding", "fc1"], "use_dora": True},
    ),
    "a connector saved whole": (
        "LLaVA 1.5",
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    ),
    "a connector saved whole, transposed": (
        "Gemma 3",
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
    ),
    "token rows": ("Qwen2.5-VL", {"target_modules": ["q_proj"], "trainable_token_indices": [3]}),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_multimodal_model_are_adapted_as_peft_merges_them(
    tmp_path: Path, part: str
) -> None:
    family, settings = PARTS[part]
    model = make_multimodal(MULTIMODAL[family], seed=5)
    model.save_pretrained(tmp_path / "base")
    adapted = write_adapter(tmp_path / "adapter", model, family, **settings)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    expert = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)
    compare(expert, base, folder=tmp_path)
