"""Plans, runs and builds as tables and JSON for people and scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.format.references import Reference
from mmerge.pipeline.build.run import RunReport
from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.planning.plan import CopyShard, MergePlan, MergeShard
from mmerge.pipeline.views.show import BuildSummary, summarise_masks
from mmerge.workers.exports.lora import AdapterReport


def plan_to_json(plan: MergePlan) -> dict[str, Any]:
    """Return a plan as JSON: totals, shards, carried tensors per expert. Equal recipes give equal
    JSON.
    """
    recipe = plan.recipe
    return {
        "name": recipe.name,
        "method": recipe.method,
        "parameters": recipe.describe_parameters(),
        "kind": plan.kind,
        "merge": recipe.merge,
        "dtype": plan.dtype,
        "output": recipe.output,
        "base": recipe.base if recipe.has_base else None,
        "experts": {
            expert.name: {
                "path": expert.uri,
                "modality": expert.modality,
                "parameters": recipe.describe_parameters(expert.name),
            }
            for expert in recipe.experts
        },
        "num_parameters": plan.num_parameters,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_bytes": plan.peak_bytes,
        "shards": (
            [_merge_shard_to_json(shard) for shard in plan.merge_shards]
            + [_copy_shard_to_json(shard) for shard in plan.copy_shards]
        ),
        "carried": {
            expert.name: [
                {
                    "name": tensor.name,
                    "role": tensor.role,
                    "dtype": tensor.source.spec.dtype,
                    "shape": list(tensor.source.spec.shape),
                }
                for shard in plan.carry_shards
                if shard.expert == expert.name
                for tensor in shard.tensors
            ]
            for expert in recipe.experts
        },
    }


def _merge_shard_to_json(shard: MergeShard) -> dict[str, Any]:
    return {
        "shard": shard.name, "task": "merge", "num_tensors": len(shard.tensors), "bytes_in": shard.bytes_in, "bytes_out": shard.bytes_out,
        "peak_bytes": shard.peak_bytes,
    }  # fmt: skip


def _copy_shard_to_json(shard: CopyShard) -> dict[str, Any]:
    return {
        "shard": shard.name, "task": "copy", "num_tensors": len(shard.tensors), "bytes_in": shard.num_bytes, "bytes_out": shard.num_bytes,
        "peak_bytes": shard.peak_bytes,
    }  # fmt: skip


def print_plan(plan: MergePlan, console: Console) -> None:
    """Print a plan: totals, shards, carried tensors per expert."""
    recipe = plan.recipe
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.method} of {len(recipe.experts)} experts into"
        f" {escape(recipe.output)}"
    )
    console.print(
        f"  {plan.num_parameters:,} merged parameters ({recipe.merge}), written as {plan.dtype},"
        f" build of kind {plan.kind}"
    )
    console.print(
        f"  reads {to_size(plan.bytes_in)} (twice: to survey, then to merge or copy), writes"
        f" {to_size(plan.bytes_out)}, at most {to_size(plan.peak_bytes)} of memory per task\n"
    )
    table = Table("shard", "task", box=None, header_style="bold", pad_edge=False)
    for column in ("tensors", "in", "out", "peak memory"):
        table.add_column(column, justify="right")
    for shard in plan.merge_shards:
        table.add_row(
            shard.name,
            "merge",
            str(len(shard.tensors)),
            to_size(shard.bytes_in),
            to_size(shard.bytes_out),
            to_size(shard.peak_bytes),
        )
    for copy in plan.copy_shards:
        table.add_row(
            copy.name,
            "copy",
            str(len(copy.tensors)),
            to_size(copy.num_bytes),
            to_size(copy.num_bytes),
            to_size(copy.peak_bytes),
        )
    console.print(table)
    console.print("\n[bold]carried tensors[/]")
    for expert in recipe.experts:
        tensors = [
            tensor
            for shard in plan.carry_shards
            if shard.expert == expert.name
            for tensor in shard.tensors
        ]
        size = sum(tensor.source.spec.num_bytes for tensor in tensors)
        groups = Counter(
            _group_of(tensor.name, tensor.role, tensor.row_start, tensor.row_stop)
            for tensor in tensors
        )
        listed = (
            ", ".join(
                f"{group} ({count})" if count > 1 else group for group, count in groups.items()
            )
            or "none"
        )
        console.print(
            f"  {expert.name} ({expert.modality}): {len(tensors)} tensors, {to_size(size)}:"
            f" {escape(listed)}"
        )


def _group_of(name: str, role: str, row_start: int, row_stop: int) -> str:
    if role == "adapter":
        return f"adapter {name.split('.lora_')[1].split('.')[1]}"
    if role == "extra_rows":
        return f"{name} rows {row_start} to {row_stop - 1}"
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "model" else parts[:1])


def print_run(report: RunReport, console: Console) -> None:
    """Print what a run did."""
    short = report.build[:SHOWN_DIGITS]
    reference = f"{report.reference.name}@{report.reference.number}"
    if not report.is_new:
        moved = f"{reference} now names it" if report.moved else f"{reference} names it already"
        console.print(
            f"[green]nothing to do[/]: build {short} is there, made from the same inputs and"
            f" numbers; {moved}"
        )
        return
    done = ", ".join(
        f"{phase} {count}"
        + (f" (+{report.num_reused[phase]} there already)" if report.num_reused.get(phase) else "")
        for phase, count in report.num_computed.items()
    )
    console.print(
        f"[green]built[/] {short} as {reference}. Shards: {done}. Read {to_size(report.bytes_read)}"
    )
    console.print(f"  {escape(report.uri)}")


def print_adapter(report: AdapterReport, console: Console) -> None:
    """Print what an adapter holds of the merge that it was made from."""
    console.print(
        f"wrote an adapter of rank {report.rank} for {report.num_matrices} matrices to"
        f" {escape(report.folder)}"
    )
    console.print(f"  it lacks {report.residual:.2%} of the task vector's norm in them")
    if report.left_out:
        console.print(
            f"  not in it, though the merge changed them: {escape(', '.join(report.left_out))}."
            " Build with 'merge: linear' to avoid this"
        )


def print_references(references: Sequence[Reference], console: Console, *, store_uri: str) -> None:
    """Print the composites of a store."""
    console.print(f"{escape(store_uri)} holds {len(references)} composites:")
    table = Table(
        "composite", "number", "build", "created", box=None, header_style="bold", pad_edge=False
    )
    for reference in references:
        table.add_row(
            f"#{reference.name}",
            str(reference.number),
            reference.build[:SHOWN_DIGITS],
            reference.created,
        )
    console.print(table)


def print_build(summary: BuildSummary, console: Console, *, layers: bool) -> None:
    """Print a build: what it was made from, its masks, what the experts share."""
    manifest = summary.manifest
    numbers = ", ".join(f"{name} {value}" for name, value in manifest.parameters.items())
    console.print(
        f"[bold]build {manifest.build[:SHOWN_DIGITS]}[/]: {manifest.method} ({numbers}), kind"
        f" {manifest.kind}, {manifest.dtype}"
    )
    console.print(
        f"  {len(manifest.entries)} objects, {to_size(summary.num_bytes)}; base"
        f" {manifest.base.revision[:SHOWN_DIGITS]}\n"
    )
    table = Table("expert", "modality", "revision", box=None, header_style="bold", pad_edge=False)
    table.add_column("mask density", justify="right")
    table.add_column("sign agreement", justify="right")
    masks = {mask.expert: mask for mask in summary.masks}
    for expert in manifest.experts:
        mask = masks.get(expert.name)
        shares = (f"{mask.density:.1%}", f"{mask.sign_agreement:.1%}") if mask else ("-", "-")
        table.add_row(expert.name, expert.modality, expert.revision[:SHOWN_DIGITS], *shares)
    console.print(table)
    if summary.consensus:
        words = {0: "none (catastrophic)", 1: "one (selfish)"}
        wanted = ", ".join(
            f"{words.get(count, count)} {share:.1%}"
            for count, share in enumerate(summary.consensus.wanted)
        )
        console.print(f"\nentries wanted by {wanted}")
        if summary.consensus.overlaps:
            console.print(
                "wanted by both of "
                + ", ".join(
                    f"{pair} {share:.1%}" for pair, share in summary.consensus.overlaps.items()
                )
            )
    if layers and summary.masks:
        _print_layers(summary, console)


def _print_layers(summary: BuildSummary, console: Console) -> None:
    from mmerge.manifests.format.tensor_names import layer_of

    numbers = sorted({layer for row in summary.rows if (layer := layer_of(row.name)) is not None})
    table = Table(
        "layer",
        *(expert.name for expert in summary.manifest.experts),
        box=None,
        header_style="bold",
        pad_edge=False,
        title="mask density (sign agreement)",
    )
    for number in numbers:
        found = summarise_masks(summary.manifest, summary.rows, layer=number)
        table.add_row(
            str(number), *(f"{mask.density:.1%} ({mask.sign_agreement:.1%})" for mask in found)
        )
    console.print()
    console.print(table)
