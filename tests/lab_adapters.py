"""LoRA adapters for the bases of the lab: random factors, written as PEFT writes them."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save_file

from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.reconstruction.build_reader import BuildReader

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
PREFIX = "base_model.model."


def make_factors(lab: Any, seed: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(lab.config["num_hidden_layers"]):
        for linear in LINEARS:
            name = f"model.layers.{layer}.{linear}"
            out, width = lab.base[f"{name}.weight"].shape
            factors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(
                (rank, width), generator=generator
            )
            factors[f"{PREFIX}{name}.lora_B.weight"] = 0.1 * torch.randn(
                (out, rank), generator=generator
            )
    return factors


def write_adapter(
    lab: Any,
    name: str,
    *,
    seed: int,
    rank: int = 4,
    pickled: bool = False,
    more: Any = None,
    **config: Any,
) -> dict[str, torch.Tensor]:
    folder = lab.folder / name
    folder.mkdir(exist_ok=True)
    factors = make_factors(lab, seed, rank) | (more or {})
    if pickled:
        torch.save(factors, folder / "adapter_model.bin")
    else:
        save_file(factors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return factors


def delta_of(factors: dict[str, torch.Tensor], name: str, scale: float) -> torch.Tensor:
    path = PREFIX + name.removesuffix(".weight")
    if f"{path}.lora_A.weight" not in factors:
        return torch.zeros(())
    return (
        scale
        * (
            factors[f"{path}.lora_B.weight"].double() @ factors[f"{path}.lora_A.weight"].double()
        ).float()
    )


def make_float32_base(lab: Any) -> dict[str, Any]:
    """Write a base in float32 and return a recipe of task arithmetic over it."""
    lab.dtype = torch.float32
    lab.make_base()
    return {"name": "loras", "base": "base", "method": "task_arithmetic", "output": "store"}


def build(lab: Any, raw: dict[str, Any], **options: Any) -> BuildReader:
    run(make_plan(read_recipe(lab.write_recipe(raw)), **options))
    return BuildReader(str(lab.folder / raw["output"]))


def experts(*names: str, **numbers: Any) -> dict[str, Any]:
    return {name: {"path": name, "modality": "text"} | numbers for name in names}
