"""Synthetic checkpoints of a LLaMA shape: a base and experts near it, bfloat16.

They are written once and reused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE_BYTES = 256 << 20
"""Where a checkpoint begins a new file."""
POOL_ENTRIES = (1 << 24) + 12_289
"""Normal numbers that are drawn once; each tensor takes them from a place of its own on."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000
    tied: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Its tensors by name."""
        kv = self.kv_heads * self.hidden // self.heads
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            shapes |= {
                p + "input_layernorm.weight": (self.hidden,),
                p + "post_attention_layernorm.weight": (self.hidden,),
                p + "self_attn.q_proj.weight": (self.hidden, self.hidden),
                p + "self_attn.k_proj.weight": (kv, self.hidden),
                p + "self_attn.v_proj.weight": (kv, self.hidden),
                p + "self_attn.o_proj.weight": (self.hidden, self.hidden),
                p + "mlp.gate_proj.weight": (self.ffn, self.hidden),
                p + "mlp.up_proj.weight": (self.ffn, self.hidden),
                p + "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def num_bytes(self) -> int:
        """Bytes of one checkpoint in bfloat16."""
        return sum(2 * torch.Size(shape).numel() for shape in self.tensors.values())


SHAPES = {
    "60m": Shape(512, 1408, 8, 8, 2),
    "300m": Shape(1024, 2816, 22, 16, 4),
    "1.1b": Shape(2048, 5632, 22, 32, 4),
    "4.1b": Shape(2048, 5632, 88, 32, 4),
    "one-tensor": Shape(2048, 256, 1, 32, 4, vocabulary=1_000_000, tied=True),
}
"""By name; `4.1b` is `1.1b` with four times the layers, `one-tensor` has a tensor of 4 GB."""


def make_checkpoints(folder: Path, shape: Shape, *, num_experts: int) -> list[Path]:
    """Return the folders of base and experts below `folder`; existing files are kept."""
    paths = [folder / "base", *(folder / f"expert{index}" for index in range(num_experts))]
    missing = [path for path in paths if not (path / "config.json").exists()]
    if missing:
        _write(paths, shape)
    return paths


def _write(paths: list[Path], shape: Shape) -> None:
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL_ENTRIES, generator=generator)

    def draw(sizes: tuple[int, ...]) -> torch.Tensor:
        start = int(torch.randint(POOL_ENTRIES, (), generator=generator))
        count = torch.Size(sizes).numel()
        if start + count <= POOL_ENTRIES:
            return pool[start : start + count].clone().reshape(sizes)
        return torch.cat([pool[start:], pool.repeat(-(-count // POOL_ENTRIES))])[:count].reshape(
            sizes
        )

    weight_maps: list[dict[str, str]] = [{} for _ in paths]
    waiting: list[dict[str, torch.Tensor]] = [{} for _ in paths]
    number, num_bytes = 1, 0
    names = list(shape.tensors)
    for name, sizes in shape.tensors.items():
        base = draw(sizes).mul_(0.02).to(torch.bfloat16)
        waiting[0][name] = base
        for expert in waiting[1:]:
            expert[name] = draw(sizes).mul_(5e-4).add_(base).to(torch.bfloat16)
        num_bytes += base.nbytes
        if num_bytes >= FILE_BYTES or name == names[-1]:
            file = f"model-{number:05d}.safetensors"
            for path, tensors, weight_map in zip(paths, waiting, weight_maps, strict=True):
                save_file(tensors, path / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file)
                tensors.clear()
            number, num_bytes = number + 1, 0
    for path, weight_map in zip(paths, weight_maps, strict=True):
        index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(shape.config))
