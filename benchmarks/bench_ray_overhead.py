"""Measure what Ray costs on one node: a build on a local cluster of one worker against `serial`, the cluster's start excepted.

Both run in turn, from a fresh store each, over synthetic checkpoints; with --forecast the scheduler's simulation of the same runs,
with the rates of the serial one, stands beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = {
    "tiny": {"hidden": 512, "ffn": 1408, "layers": 8, "vocab": 4000},
    "0.3b": {"hidden": 1024, "ffn": 2816, "layers": 22, "vocab": 16000},
    "1.1b": {"hidden": 2048, "ffn": 5632, "layers": 22, "vocab": 32000},
}


def write_checkpoints(folder: Path, shape: dict[str, int], num_experts: int) -> Path:
    """Write a base and experts in bfloat16 and return the path of a recipe over them."""
    hidden, ffn, layers, vocab = shape["hidden"], shape["ffn"], shape["layers"], shape["vocab"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 512, "head_dim": 64,
        "vocab_size": vocab, "tie_word_embeddings": False,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,), prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden), prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (hidden // 8, hidden), prefix + "self_attn.v_proj.weight": (hidden // 8, hidden),
            prefix + "mlp.gate_proj.weight": (ffn, hidden), prefix + "mlp.up_proj.weight": (ffn, hidden), prefix + "mlp.down_proj.weight": (hidden, ffn),
        }  # fmt: skip
    noise = torch.randn(1 << 22).mul_(0.02)
    for number in range(num_experts + 1):
        path = folder / ("base" if number == 0 else f"expert{number}")
        path.mkdir()
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, size in shapes.items():
            entries = torch.Size(size).numel()
            start = int(torch.randint(1 << 21, (1,), generator=generator))
            tensors[name] = noise[start : start + (1 << 21)].repeat(entries // (1 << 21) + 1)[:entries].reshape(size).to(torch.bfloat16)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    recipe = folder / "recipe.yaml"
    experts = "".join(f"  e{number}: {{path: expert{number}, modality: m{number}}}\n" for number in range(1, num_experts + 1))
    recipe.write_text(f"name: bench\nbase: base\nmethod: mmer\noutput: store\nexperts:\n{experts}")
    return recipe


def measure(plan: Any, store: Path, executor: Any) -> tuple[float, Any]:
    """Return the seconds of one build from nothing, and how each phase went."""
    from mmerge.manifests.store import open_store
    from mmerge.pipeline import run
    from mmerge.pipeline.status import RunRecord, begin_run

    shutil.rmtree(store, ignore_errors=True)
    opened = open_store(str(store), create=True)
    with RunRecord(opened, begin_run(opened, "bench", exclusive=False)) as record:
        began = time.monotonic()
        run(plan, executor=executor, progress=record)
        return time.monotonic() - began, record.status


def warm(executor: Any, folder: Path) -> None:
    """Start the cluster and its worker with a build of next to nothing: their start is not what is measured."""
    from mmerge.pipeline import make_plan, read_recipe, run

    small = folder / "warm"
    small.mkdir()
    run(make_plan(read_recipe(write_checkpoints(small, {"hidden": 512, "ffn": 512, "layers": 1, "vocab": 64}, 2))), executor=executor)


def main() -> int:
    """Print the measured times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints go; a temporary folder if absent")
    parser.add_argument("--forecast", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a Ray worker: one core against one core

    from mmerge.pipeline import make_plan, read_recipe
    from mmerge.pipeline.executor import RayExecutor, SerialExecutor
    from mmerge.pipeline.simulate import Nodes, simulate
    from mmerge.pipeline.status import to_rates

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        plan = make_plan(read_recipe(write_checkpoints(folder, SHAPES[options.shape], options.experts)))
        print(
            f"{options.shape}: {plan.num_parameters / 1e9:.2f}e9 parameters, {plan.bytes_in / 1e9:.2f} GB in, {len(plan.merge_shards)} merge shards"
        )
        rays = {workers: RayExecutor(num_workers=workers) for workers in options.workers}
        if len(rays) > 1:
            sys.exit("one Ray per process: give one number of workers a time")
        times: dict[str, list[float]] = {}
        statuses: dict[str, Any] = {}
        for workers, executor in rays.items():
            warm(executor, folder)
            for _ in range(options.repeats):
                for label, found in (("serial", SerialExecutor()), (f"ray, {workers} workers", executor)):
                    seconds, statuses[label] = measure(plan, folder / "store", found)
                    times.setdefault(label, []).append(seconds)
                    print(f"  {label}: {seconds:.2f} s", flush=True)
            executor.close()
        best = {label: min(found) for label, found in times.items()}
        for label, found in times.items():
            print(f"{label}: best {best[label]:.2f} s, median {statistics.median(found):.2f} s")
        for label in best:
            if label != "serial":
                print(f"{label} against serial: {best[label] / best['serial'] - 1:+.1%}")
        if options.forecast:
            for workers in rays:
                made = simulate(plan, Nodes(1, workers, 1e12, 1e12), rates=to_rates(statuses["serial"]))
                real = best[f"ray, {workers} workers"]
                print(f"forecast for {workers} workers: {made.seconds:.2f} s, real {real:.2f} s ({made.seconds / real - 1:+.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
