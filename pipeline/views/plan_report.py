"""Plans, forecasts and simulations as tables and JSON: what `mmerge plan` shows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.console import Console

from mmerge.pipeline.build.forecast import Forecast
from mmerge.pipeline.build.simulation import Simulation
from mmerge.pipeline.monitoring.printable import escape
from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.pipeline.recipes.inputs import LayerSlice, describe_slices
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.pipeline.views.tables import make_table

_STATES = {
    "compute": "[yellow]compute[/]",
    "reuse": "[green]reuse[/]",
    "unknown": "unknown",
}


def plan_to_json(plan: MergePlan) -> dict[str, Any]:
    """Return a plan as JSON: totals, shards, copied tensors of every expert.

    Equal recipes give equal JSON.
    """
    recipe = plan.recipe
    experts = {
        expert.name: {
            "path": expert.uri,
            "modality": expert.modality,
            "parameters": recipe.describe_parameters(expert.name),
            **_describe_input(expert.adapter, expert.slices),
        }
        for expert in recipe.experts
    }
    shards = [_merge_shard_to_json(shard) for shard in plan.merge_shards]
    shards += [_copy_shard_to_json(shard) for shard in plan.copy_shards]
    return {
        "name": recipe.name,
        "method": recipe.method,
        "parameters": recipe.describe_parameters(),
        "kind": plan.kind,
        "merge": recipe.merge,
        "dtype": plan.dtype,
        "output": recipe.output,
        "base": recipe.base if recipe.has_base else None,
        **_describe_rearrangement(recipe),
        "experts": experts,
        "warnings": list(plan.warnings),
        "num_parameters": plan.num_parameters,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_bytes": plan.peak_bytes,
        "shards": shards,
        "copied": {
            expert.name: _copied_tensors_to_json(plan, expert.name) for expert in recipe.experts
        },
    }


def _describe_input(
    adapter: str | None, slices: tuple[LayerSlice, ...], prefix: str = ""
) -> dict[str, Any]:
    """Return what an input is put together from; empty for a whole checkpoint."""
    described: dict[str, Any] = {}
    if adapter is not None:
        described[f"{prefix}lora"] = adapter
    if slices:
        described[f"{prefix}slices"] = describe_slices(slices)
    return described


def _describe_rearrangement(recipe: Recipe) -> dict[str, Any]:
    """Return how base and tokens are put together; empty for most recipes."""
    described: dict[str, Any] = {}
    if recipe.has_base:
        described = _describe_input(recipe.base_adapter, recipe.base_slices, "base_")
    if recipe.vocabulary is not None:
        described["tokenizer"] = recipe.vocabulary.to_keys()
    if recipe.chat_template is not None:
        described["chat_template"] = recipe.chat_template
    if recipe.keep:
        described["keep"] = list(recipe.keep)
    return described


def _merge_shard_to_json(shard: MergeShard) -> dict[str, Any]:
    return {
        "shard": shard.name,
        "task": "merge",
        "num_tensors": len(shard.tensors),
        "bytes_in": shard.bytes_in,
        "bytes_out": shard.bytes_out,
        "peak_bytes": shard.peak_bytes,
    }


def _copy_shard_to_json(shard: CopyShard) -> dict[str, Any]:
    return {
        "shard": shard.name,
        "task": "copy",
        "num_tensors": len(shard.tensors),
        "bytes_in": shard.num_bytes,
        "bytes_out": shard.num_bytes,
        "peak_bytes": shard.peak_bytes,
    }


def _copied_tensors_to_json(plan: MergePlan, expert_name: str) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "role": tensor.role,
            "dtype": tensor.source.spec.dtype,
            "shape": list(tensor.source.spec.shape),
        }
        for shard in plan.carry_shards
        if shard.expert == expert_name
        for tensor in shard.tensors
    ]


def print_plan(plan: MergePlan, console: Console) -> None:
    """Print a plan: totals, shards, copied tensors of every expert."""
    recipe = plan.recipe
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.method} of {len(recipe.experts)} experts into"
        f" {escape(recipe.output)}"
    )
    console.print(
        f"  {plan.num_parameters:,} merged parameters (merge: {recipe.merge}), written as"
        f" {plan.dtype}, composite of kind {plan.kind}"
    )
    console.print(
        f"  reads {to_size(plan.bytes_in)} twice (scan, then merge or copy), writes"
        f" {to_size(plan.bytes_out)}, needs at most {to_size(plan.peak_bytes)} of memory per task\n"
    )
    table = make_table("shard", "task", numbers=("tensors", "in", "out", "peak memory"))
    for shard in plan.merge_shards:
        table.add_data(
            shard.name,
            "merge",
            str(len(shard.tensors)),
            to_size(shard.bytes_in),
            to_size(shard.bytes_out),
            to_size(shard.peak_bytes),
        )
    for copy in plan.copy_shards:
        table.add_data(
            copy.name,
            "copy",
            str(len(copy.tensors)),
            to_size(copy.num_bytes),
            to_size(copy.num_bytes),
            to_size(copy.peak_bytes),
        )
    console.print(table)
    console.print("\n[bold]copied tensors (not merged)[/]")
    for expert in recipe.experts:
        _print_copied_tensors(plan, expert.name, expert.modality, console)
    print_warnings(plan, console)


def print_warnings(plan: MergePlan, console: Console) -> None:
    """Print what differs between base and experts though names and shapes agree."""
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}", highlight=False)


def _print_copied_tensors(
    plan: MergePlan, expert_name: str, modality: str, console: Console
) -> None:
    groups: Counter[str] = Counter()
    num_bytes = 0
    for shard in plan.carry_shards:
        if shard.expert != expert_name:
            continue
        for tensor in shard.tensors:
            num_bytes += tensor.source.spec.num_bytes
            groups[_group_of(tensor.name, tensor.role, tensor.row_start, tensor.row_stop)] += 1
    names = [f"{group} ({count})" if count > 1 else group for group, count in groups.items()]
    console.print(
        f"  {escape(expert_name)} ({escape(modality)}): {groups.total()} tensors,"
        f" {to_size(num_bytes)}: {escape(', '.join(names) or 'none')}"
    )


def _group_of(name: str, role: str, row_start: int, row_stop: int) -> str:
    """Return what a copied tensor is listed under: the first part or two of its name."""
    if role == "adapter":
        return f"adapter {name.split('.lora_')[1].split('.')[1]}"
    if role == "extra_rows":
        return f"{name} rows {row_start} to {row_stop - 1}"
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "model" else parts[:1])


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Print which shards a run would compute, and why."""
    console.print("\n[bold]what a run would do[/]")
    for shard in forecast.shards:
        console.print(
            f"  {_STATES[shard.state]} {shard.task} {escape(shard.shard)}: {escape(shard.reason)}",
            highlight=False,
        )
    total = (
        f"  {forecast.count('compute')} shards to compute, {forecast.count('reuse')} in the store"
    )
    if forecast.count("unknown"):
        total += (
            f", {forecast.count('unknown')} undecided until the inputs of"
            f" {len(forecast.to_scan)} shards are scanned ('mmerge plan --scan')"
        )
    console.print(total)


def simulation_to_json(simulation: Simulation) -> dict[str, Any]:
    """Return a simulation as JSON; seconds, bytes, bytes per second."""
    return dataclasses.asdict(simulation)


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Print a simulation: wall time, bottleneck, bytes and memory per node."""
    nodes = simulation.nodes
    console.print(
        f"\n[bold]on {nodes.num_nodes} nodes with {nodes.num_cores} cores[/] (simulated, into an"
        " empty store)",
        highlight=False,
    )
    start = ""
    if simulation.start_seconds >= 0.05:
        start = f", of which {simulation.start_seconds:.1f} s to start the workers"
    console.print(
        f"  {simulation.seconds:.0f} s for {simulation.num_tasks} tasks{start}; limited by"
        f" {simulation.limit}",
        highlight=False,
    )
    console.print(
        f"  per node at most {to_size(simulation.bytes_read_per_node)} read,"
        f" {to_size(simulation.bytes_written_per_node)} written,"
        f" {to_size(simulation.memory_per_node)} of memory",
        highlight=False,
    )
    table = make_table("phase", numbers=("tasks", "seconds"))
    table.add_column("limited by")
    for phase in simulation.phases:
        table.add_data(phase.name, str(phase.num_tasks), f"{phase.seconds:.1f}", phase.limit)
    console.print(table)
