"""Compare mergekit and mmerge on the same YAML, entry by entry.

Inputs are the lab's base and experts.

mergekit is a program of its own in an environment of its own (`make bench-peers` makes it); nothing
of it is imported. Both compute in float32 and write the dtype asked for. Entries that a sort of
equal magnitudes decides are set apart: which of equals is kept is open there.

    python benchmarks/peer_equality.py --mergekit .venv-peers/bin/mergekit-yaml --table
    docs/peer-equality.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from mmerge.pipeline import export, make_plan, read_recipe, run
from mmerge.pipeline.planning.name_matching import make_renamer, match_expert
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.methods import method_names

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "examples" / "lab" / "checkpoints"
EXPERTS = ("image", "audio", "video")
MANTISSA_BITS = {"bfloat16": 7, "float32": 23}
DTYPES = tuple(MANTISSA_BITS)
WEIGHTS = (0.7, 0.5, 0.9)
FILTERED = [
    {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
    {"filter": "mlp", "value": [1.0, 0.5, 0.7, 0.3, 0.0]},
    {"value": 0.5},
]


@dataclass(frozen=True)
class Result:
    """Distances of one method in one dtype, entries decided by a sort of ties left out."""

    label: str
    dtype: str
    num_entries: int
    num_decided_by_sort: int
    num_compared: int
    num_equal: int
    num_within_one: int
    """Entries whose two numbers are equal or neighbours in the dtype."""
    largest: float
    """Largest distance, in units in the last place of the largest number that goes into an entry or
    comes out of it.
    """


def make_configs() -> dict[str, dict[str, Any]]:
    """Return mergekit YAMLs by label, without paths and dtypes."""

    def models(**numbers: Any) -> list[dict[str, Any]]:
        return [
            {"model": name, "parameters": {"weight": weight, **numbers}}
            for name, weight in zip(EXPERTS, WEIGHTS, strict=True)
        ]

    plain = [{"model": name} for name in EXPERTS]
    gradient = [
        {"model": name, "parameters": {"weight": [0.2, 1.0], "density": 0.4}} for name in EXPERTS
    ]
    return {
        "linear": {"merge_method": "linear", "models": models()},
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": models(),
            "parameters": {"lambda": 0.6},
        },
        "ties": {"merge_method": "ties", "base_model": "base", "models": models(density=0.5)},
        "ties, weights over depth": {
            "merge_method": "ties",
            "base_model": "base",
            "models": gradient,
            "parameters": {"normalize": False},
        },
        "breadcrumbs": {
            "merge_method": "breadcrumbs",
            "base_model": "base",
            "models": models(density=0.7, gamma=0.05),
        },
        "breadcrumbs_ties": {
            "merge_method": "breadcrumbs_ties",
            "base_model": "base",
            "models": models(density=0.7, gamma=0.05),
        },
        "sce": {
            "merge_method": "sce",
            "base_model": "base",
            "models": plain,
            "parameters": {"select_topk": 0.6},
        },
        "slerp": {
            "merge_method": "slerp",
            "base_model": "image",
            "models": [{"model": "image"}, {"model": "audio"}],
            "parameters": {"t": 0.4},
        },
        "slerp, filters over depth": {
            "merge_method": "slerp",
            "base_model": "image",
            "models": [{"model": "image"}, {"model": "audio"}],
            "parameters": {"t": FILTERED},
        },
        "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": plain},
    }


def write_language_models(folder: Path) -> None:
    """Write the base and each expert's language model for a text-only tool.

    Experts get the base's tensor names and number of rows.
    """
    base = Checkpoint(str(LAB / "base"), owner="base")
    shapes = {name: source.spec.shape for name, source in base.tensors.items()}
    for name in ("base", *EXPERTS):
        target = folder / name
        target.mkdir(parents=True)
        tensors = load_file(LAB / name / "model.safetensors")
        if name != "base":
            match = match_expert(base, Checkpoint(str(LAB / name), owner=name))
            renamer = make_renamer(match.renames)
            tensors = {
                base_name: tensors[renamer(base_name)][: shape[0]].contiguous()
                for base_name, shape in shapes.items()
            }
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        for file in (
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            shutil.copy(LAB / "base" / file, target / file)


Tensors = dict[str, torch.Tensor]


def compare(
    theirs: Tensors, ours: Tensors, *, models: list[Tensors], tied: Tensors, label: str, dtype: str
) -> Result:
    """Return the distances between two checkpoints, entries marked in `tied` left out.

    Raises:
        ValueError: their tensors or dtypes differ.
    """
    if theirs.keys() != ours.keys():
        raise ValueError(
            f"{label}: the outputs have different tensors: "
            f"{sorted(theirs.keys() ^ ours.keys())[:3]}"
        )
    steps, distances = [], []
    for name, value in theirs.items():
        if value.dtype != ours[name].dtype:
            raise ValueError(f"{label}: {name} is {value.dtype} and {ours[name].dtype}")
        kept = ~tied.get(name, torch.zeros(value.shape, dtype=torch.bool)).reshape(-1)
        steps.append((to_ordered(value) - to_ordered(ours[name])).abs()[kept])
        involved = [value, ours[name], *(model[name] for model in models)]
        size = torch.stack([tensor.double().abs() for tensor in involved]).amax(dim=0)
        unit = torch.ldexp(
            torch.ones_like(size), torch.frexp(size).exponent - 1 - MANTISSA_BITS[dtype]
        )
        distances.append(
            ((value.double() - ours[name].double()).abs() / unit).nan_to_num(0).reshape(-1)[kept]
        )
    step, distance = torch.cat(steps), torch.cat(distances)
    total = sum(value.numel() for value in theirs.values())
    return Result(
        label,
        dtype,
        total,
        total - step.numel(),
        step.numel(),
        int((step == 0).sum()),
        int((step <= 1).sum()),
        float(distance.max()),
    )


def to_ordered(values: torch.Tensor) -> torch.Tensor:
    """Return values as flat integers in which adjacent numbers of their dtype differ by 1.

    Both zeros are 0.
    """
    bits = (
        values.reshape(-1)
        .view(torch.int16 if values.element_size() == 2 else torch.int32)
        .to(torch.int64)
    )
    sign_bit = 1 << (8 * values.element_size() - 1)
    return torch.where(bits < 0, -(bits + sign_bit), bits)


def find_ties(config: dict[str, Any], models: dict[str, Tensors]) -> Tensors:
    """Return by tensor the entries whose selection depends on the order of equal magnitudes.

    For SCE these are all entries of the tensor, because its weights depend on the selection.
    """
    method, names = config["merge_method"], [entry["model"] for entry in config["models"]]
    base = models.get(config.get("base_model", ""), {})
    ties: Tensors = {}
    for name, value in base.items():
        deltas = [models[model][name].float() - value.float() for model in names]
        marked = torch.zeros(value.shape, dtype=torch.bool)
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            for delta, entry in zip(deltas, config["models"], strict=True):
                kept = int(entry["parameters"]["density"] * delta.numel())
                top = min(
                    int(entry["parameters"].get("gamma", 0) * delta.numel()), delta.numel() - kept
                )
                for count in (top, top + kept):
                    marked |= border(delta.abs(), count)
        elif method == "sce":
            variance = torch.stack(deltas).var(dim=0, unbiased=False)
            count = int(int(variance.count_nonzero()) * config["parameters"]["select_topk"])
            marked |= border(variance, count, tolerance=1e-6).any()
        ties[name] = marked
    return ties


def border(values: torch.Tensor, count: int, *, tolerance: float = 0.0) -> torch.Tensor:
    """Return the entries equal to the smallest of the `count` largest.

    Empty where all entries of that value are among the `count` largest.
    """
    if not 0 < count < values.numel():
        return torch.zeros(values.shape, dtype=torch.bool)
    ordered = values.reshape(-1).sort(descending=True).values
    last, first_out = float(ordered[count - 1]), float(ordered[count])
    if last - first_out > tolerance * last or last == 0:
        return torch.zeros(values.shape, dtype=torch.bool)
    return (values - last).abs() <= tolerance * last


def run_both(
    label: str,
    config: dict[str, Any],
    dtype: str,
    folder: Path,
    mergekit: str,
    models: dict[str, Tensors],
) -> Result:
    """Run one YAML with both programs and compare what they write."""
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{label}-{dtype}")
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(config | {"dtype": "float32", "out_dtype": dtype}))
    theirs, ours = folder / f"{name}-theirs", folder / f"{name}-ours"
    command = [mergekit, "--quiet", "--no-cuda", "--no-write-model-card", str(path), str(theirs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mergekit failed on {label}:\n{done.stderr[-2000:]}")
    run(make_plan(read_recipe(path)))
    export(str(folder / f"{name}-composite"), ours)
    used = [
        models[name]
        for name in {
            config.get("base_model", "base"),
            *(entry["model"] for entry in config["models"]),
        }
    ]
    tied = find_ties(config, models)
    return compare(
        read_folder(theirs), read_folder(ours), models=used, tied=tied, label=label, dtype=dtype
    )


def read_folder(folder: Path) -> Tensors:
    """Return all tensors of a checkpoint folder."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


NOTES = (
    "- *Excluded*: bfloat16 checkpoints have many equal magnitudes. Where an exact count ends"
    " among equal magnitudes (`ties`, `breadcrumbs`; in `sce` the border of the selection changes"
    " the weights of its whole tensor), mergekit keeps the entries that its sort puts first,"
    " `mmerge` those at lower positions. These entries are not compared.",
    "- *Equal or adjacent*: the two values are at most one representable number of the dtype"
    " apart.",
    "- *Largest distance*: in units in the last place of the largest input or output of the entry."
    " A sum that nearly cancels is many representable numbers away after one additional rounding"
    " (mergekit's `linear` uses fused multiply-add where the processor has it; `mmerge` does not,"
    " so that its bytes are the same on every processor).",
    "- float32 rows show the coefficients that a method computes from a whole tensor (angles of"
    " `slerp` and `model_stock`, weights of `sce`): mergekit sums in float32 in the order of its"
    " threads, `mmerge` sums exactly.",
)


def to_page(results: list[Result], version: str) -> str:
    """Return the results as the page docs/peer-equality.md."""
    introduction = (
        f"mergekit {version} and `mmerge run` on the same YAML files: the lab's base and the"
        f" language models of its three experts ({results[0].num_entries:,} parameters). Both"
        " compute in float32 and write the dtype in the second column. `make bench-peers` writes"
        " this page."
    )
    headings = (
        "YAML",
        "dtype",
        "excluded (ties of a sort)",
        "equal, of the others",
        "equal or adjacent",
        "largest distance (ulp)",
    )
    lines = [
        "# Differences from mergekit",
        "",
        textwrap.fill(introduction, 100),
        "",
        f"| {' | '.join(headings)} |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        equal, close = (
            f"{count / max(result.num_compared, 1):.4%}"
            for count in (result.num_equal, result.num_within_one)
        )
        tied = f"{result.num_decided_by_sort / result.num_entries:.2%}"
        lines.append(
            f"| {result.label} | {result.dtype} | {tied} | {equal} | {close} |"
            f" {result.largest:.2g} |"
        )
    notes = [textwrap.fill(note, 100, subsequent_indent="  ") for note in NOTES]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> int:
    """Compare, write the page, and return 1 if outputs in bfloat16 differ too much.

    The limit is one unit in the last place in bfloat16, the lab's dtype.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit",
        default=str(ROOT / ".venv-peers" / "bin" / "mergekit-yaml"),
        help="the program to compare with",
    )
    parser.add_argument(
        "--table", type=Path, help="where to write the table; it is printed in any case"
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    mergekit = str(Path(arguments.mergekit).absolute())
    code = "from importlib.metadata import version; print(version('mergekit'))"
    version = subprocess.run(
        [str(Path(mergekit).parent / "python"), "-c", code],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_language_models(folder)
        models = {name: read_folder(folder / name) for name in ("base", *EXPERTS)}
        for label, config in make_configs().items():
            if config["merge_method"] not in method_names():
                print(f"{label}: no such method here", file=sys.stderr)
                continue
            results += [
                run_both(label, config, dtype, folder, mergekit, models) for dtype in DTYPES
            ]
    table = to_page(results, version)
    print(table)
    if arguments.table:
        arguments.table.write_text(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(result) for result in results], indent=2) + "\n")
    return int(any(result.largest > 1 for result in results if result.dtype == "bfloat16"))


if __name__ == "__main__":
    sys.exit(main())
