"""Digests of reference builds: every lab recipe, and one synthetic build per method.

    python tests/build_digests.py tests/data/build_digests.json

`tests/test_build_digests.py` compares them with the committed file, so a change of the code that
changes names or bytes of stored objects fails. Inputs are made of integers alone and therefore
equal on every machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from mmerge.pipeline import make_plan, parse_recipe, run

LAB = Path(__file__).resolve().parent.parent / "examples" / "lab"
LAB_RECIPES = ("mmer", "mmer_new", "naive_mc", "task_arithmetic", "ties", "damc")
WHOLE_MATRIX = frozenset({"tsv", "iso_c", "wudi", "optmerge", "swudi", "aswudi"})
"""Methods whose bits depend on the linear-algebra library and the processor."""

SYNTHETIC: dict[str, dict[str, Any]] = {
    "mmer": {},
    "mmer tensor": {"method": "mmer", "scope": "tensor", "mask_scale": 0.6},
    "tall_masks": {},
    "tall_masks ties": {"method": "tall_masks", "multi_task": "ties"},
    "emr": {},
    "naive_mc": {},
    "linear": {},
    "task_arithmetic": {"scale": 0.4},
    "ties": {},
    "ties majority": {"method": "ties", "zero_sign": "majority"},
    "ties exact": {"method": "ties", "scope": "tensor", "count": "exact"},
    "ties linear layers": {"method": "ties", "merge": "linear"},
    "dare_linear": {},
    "dare_ties": {},
    "dare_ties norm": {"method": "dare_ties", "rescale": "norm"},
    "della": {},
    "della norm": {"method": "della", "rescale": "norm"},
    "della_linear": {},
    "breadcrumbs": {},
    "breadcrumbs_ties": {},
    "sce": {},
    "pcb": {},
    "pcb tensor": {"method": "pcb", "scope": "tensor"},
    "consensus": {},
    "ram": {},
    "ram_plus": {},
    "slerp": {"experts": 2, "t": 0.4},
    "nuslerp": {"experts": 2},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "nearswap": {"experts": 1, "t": 0.002},
    "arcee_fusion": {"experts": 1},
    "tsv": {},
    "iso_c": {},
    "wudi": {},
    "optmerge": {},
    "swudi": {},
    "aswudi": {},
    "adamms": {"experts": 2, "alpha": 0.3},
    "neuron_fusion": {"experts": 1},
}

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 90,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, ffn, kv, vocab = 48, 80, 24, 90
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _draw(rng: np.random.Generator, shape: tuple[int, ...], *, step: float) -> torch.Tensor:
    """Return a heavy-tailed tensor of small integers times a power of two, exact in float32."""
    total = rng.integers(-15, 16, shape) * rng.integers(0, 16, shape) + rng.integers(-7, 8, shape)
    return torch.from_numpy(total.astype(np.float32)) * step


def make_checkpoints(folder: Path) -> None:
    """Write a LLaMA base and three LLaVA-shaped experts tuned from it."""
    rng = np.random.default_rng(20)
    base = {
        name: _draw(rng, shape, step=2**-9).to(torch.bfloat16) for name, shape in _shapes().items()
    }
    _write(folder / "base", base, SHAPE)
    for index, name in enumerate(("image", "audio", "video")):
        tensors: dict[str, torch.Tensor] = {}
        for key, value in base.items():
            tuned = value.float() + _draw(rng, tuple(value.shape), step=2**-13) * (index + 1)
            if "embed_tokens" in key or "lm_head" in key:
                tuned = torch.cat([tuned, _draw(rng, (2, value.shape[1]), step=2**-9)])
            tensors["language_model." + key] = tuned.to(torch.bfloat16)
        tensors["multi_modal_projector.linear_1.weight"] = _draw(rng, (48, 8), step=2**-8).to(
            torch.bfloat16
        )
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": SHAPE | {"vocab_size": 92},
        }
        _write(folder / name, tensors, config)


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))


def describe(raw: dict[str, Any], folder: Path) -> dict[str, str]:
    """Run a recipe and return the digests of its build: name, object keys, contents."""
    manifest = run(make_plan(parse_recipe(raw, folder=folder))).manifest
    assert manifest is not None
    entries = [entry.model_dump(mode="json") for entry in manifest.entries]
    keys = sorted(entry["key"] for entry in entries)
    contents = sorted([entry["key"], entry["digest"]] for entry in entries)
    return {"build": manifest.build, "keys": _digest(keys), "contents": _digest(contents)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def lab_digests(name: str, output: Path) -> dict[str, str]:
    """Return the digests of a lab recipe's build."""
    raw = yaml.safe_load((LAB / "recipes" / f"{name}.yaml").read_text()) | {"output": str(output)}
    return describe(raw, LAB / "recipes")


def synthetic_digests(title: str, folder: Path) -> dict[str, str]:
    """Return the digests of a build of the checkpoints of `make_checkpoints` in this folder."""
    options = dict(SYNTHETIC[title])
    names = ("image", "audio", "video")[: options.pop("experts", 3)]
    method = options.pop("method", title)
    experts = {name: {"path": name, "modality": name} for name in names}
    raw = {
        "name": "build",
        "base": "base",
        "method": method,
        "output": f"store-{title.replace(' ', '-')}",
        "experts": experts,
    }
    # The names of whole-matrix objects hold the math library: a fixed one here.
    with patch(
        "mmerge.workers.runtime.math_library._find_math_library", lambda device: "reference"
    ):
        return describe(raw | options, folder)


def main() -> None:
    """Write the digests of all builds to the file that the command line names."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoints(folder)
        digests = {"lab": {name: lab_digests(name, folder / "lab") for name in LAB_RECIPES}}
        digests["synthetic"] = {title: synthetic_digests(title, folder) for title in SYNTHETIC}
    Path(sys.argv[1]).write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
