"""Simulate builds of 7B, 70B and 400B models on 1 to 256 nodes.

Plans read headers of files without contents; no cluster is needed.

Prints a table, and with --plot writes the curves as SVG.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "7B": {"hidden": 4096, "ffn": 11008, "layers": 32, "kv": 4096, "vocab": 32000},
    "70B": {"hidden": 8192, "ffn": 28672, "layers": 80, "kv": 1024, "vocab": 128256},
    "400B": {"hidden": 16384, "ffn": 53248, "layers": 126, "kv": 1024, "vocab": 128256},
}
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def write_headers(path: Path, shape: dict[str, int]) -> None:
    """Write sparse checkpoint files of a LLaMA-like model, bfloat16, one per layer."""
    hidden, ffn, kv, vocab = shape["hidden"], shape["ffn"], shape["kv"], shape["vocab"]
    path.mkdir()
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocab, hidden)},
        {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)},
    ]
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        files.append(
            {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (hidden, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, hidden),
                prefix + "self_attn.k_proj.weight": (kv, hidden),
                prefix + "self_attn.v_proj.weight": (kv, hidden),
                prefix + "mlp.gate_proj.weight": (ffn, hidden),
                prefix + "mlp.up_proj.weight": (ffn, hidden),
                prefix + "mlp.down_proj.weight": (hidden, ffn),
            }
        )
    weight_map = {}
    for index, shapes in enumerate(files):
        name = f"model-{index:05d}.safetensors"
        header: dict[str, Any] = {}
        offset = 0
        for tensor, size in shapes.items():
            num_bytes = 2 * size[0] * (size[1] if len(size) > 1 else 1)
            header[tensor] = {
                "dtype": "BF16",
                "shape": list(size),
                "data_offsets": [offset, offset + num_bytes],
            }
            offset += num_bytes
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (path / name).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv // 128,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--cores", type=int, default=32)
    parser.add_argument("--read-gbps", type=float, default=2.0)
    parser.add_argument("--write-gbps", type=float, default=1.0)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()

    from mmerge.pipeline import make_plan, parse_recipe
    from mmerge.pipeline.build.simulation import simulate
    from mmerge.pipeline.execution.simulated_cluster import GB, Nodes

    curves: dict[str, list[float]] = {}
    print(
        "| model | in | nodes | seconds | limited by | read per node | memory per node"
        " |\n|---|---|---|---|---|---|---|"
    )
    for model, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            experts = [f"e{number}" for number in range(options.experts)]
            for path in ("base", *experts):
                write_headers(folder / path, shape)
            raw = {
                "name": "x",
                "base": "base",
                "method": "mmer",
                "output": "s",
                "experts": {e: {"path": e, "modality": e} for e in experts},
            }
            plan = make_plan(parse_recipe(raw, folder=folder))
            # A simulated run reads the identities of the files, so they must still exist.
            curves[model] = []
            for count in NODE_COUNTS:
                simulated = simulate(
                    plan,
                    Nodes(count, options.cores, options.read_gbps * GB, options.write_gbps * GB),
                )
                curves[model].append(simulated.seconds)
                print(
                    f"| {model} | {plan.bytes_in / GB:.0f} GB | {count} | {simulated.seconds:.0f} |"
                    f" {simulated.limit} | {simulated.bytes_read_per_node / GB:.0f} GB |"
                    f" {simulated.memory_per_node / GB:.1f} GB |",
                    flush=True,
                )
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for model, seconds in curves.items():
            axes.loglog(NODE_COUNTS, seconds, marker="o", label=model)
        axes.set_xticks(NODE_COUNTS, [str(count) for count in NODE_COUNTS])
        axes.set_xlabel(
            f"nodes ({options.cores} cores, {options.read_gbps:g} GB/s read, {options.write_gbps:g}"
            " GB/s written each)"
        )
        axes.set_ylabel("seconds, simulated")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(title=f"base + {options.experts} experts")
        figure.tight_layout()
        figure.savefig(options.plot, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
