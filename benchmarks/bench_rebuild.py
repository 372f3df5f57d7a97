"""Measure a rebuild after one expert changed in one layer.

Usage: python benchmarks/bench_rebuild.py [--layers 16] [--hidden 1024].

Writes a synthetic base and three experts, builds, changes one tensor of one expert, builds again,
and lists what was written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run

EXPERTS = ("image", "audio", "video")


def write_checkpoints(folder: Path, layers: int, hidden: int) -> None:
    """Write a LLaMA-shaped base and three experts with small random changes."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
    }
    shapes = {
        "model.embed_tokens.weight": (1000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (1000, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {
            f"{prefix}mlp.{name}_proj.weight": (3 * hidden, hidden) for name in ("gate", "up")
        }
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, 3 * hidden)}
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    for name in ("base", *EXPERTS):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        noise = 0.0 if name == "base" else 0.02
        tensors = {
            key: (
                (value.float() + noise * torch.randn(value.shape, generator=generator)).to(
                    torch.bfloat16
                )
            )
            for key, value in base.items()
        }
        save_file(tensors, folder / name / "model.safetensors")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmerge-bench-") as name:
        folder = Path(name)
        write_checkpoints(folder, options.layers, options.hidden)
        raw = {
            "base": "base",
            "method": "mmer",
            "scope": "tensor",
            "output": "store",
            "experts": {e: {"path": e, "modality": e} for e in EXPERTS},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        began, spent = time.perf_counter(), time.process_time()
        run(make_plan(read_recipe(folder / "recipe.yaml")))
        full, full_cpu = time.perf_counter() - began, time.process_time() - spent
        store = open_store(str(folder / "store"))
        before = {listed.key: listed.modified for listed in store.list_objects()}
        file = folder / "audio" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.3.mlp.up_proj.weight"] += 1
        save_file(tensors, file)
        began, spent = time.perf_counter(), time.process_time()
        report = run(make_plan(read_recipe(folder / "recipe.yaml")))
        again, again_cpu = time.perf_counter() - began, time.process_time() - spent
        written = sorted(
            listed.key
            for listed in store.list_objects()
            if before.get(listed.key) != listed.modified
        )
        print(
            f"full build {full:.2f} s, rebuild {again:.2f} s: {again / full:.0%}; computed"
            f" {report.num_computed}"
        )
        print(
            f"CPU: full build {full_cpu:.2f} s, rebuild {again_cpu:.2f} s:"
            f" {again_cpu / full_cpu:.0%}"
        )
        for prefix in ("objects", "builds", "refs", "files", "surveys"):
            keys = [key for key in written if key.startswith(prefix)]
            print(
                f"  {prefix}: {len(keys)} written"
                + (
                    f": {', '.join(keys)}"
                    if prefix != "surveys"
                    else " (a replaced file is read again to find what changed in it)"
                )
            )


if __name__ == "__main__":
    main()
