"""Placements as tables and JSON: what `mmerge place` shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.views.tables import make_table
from mmerge.workers.composite.placement import Placement


def placement_to_json(placement: Placement) -> dict[str, Any]:
    """Return a placement as JSON; sizes in bytes."""
    devices = [asdict(stage) | {"total": stage.memory.total} for stage in placement.stages]
    return {
        "by": placement.by,
        "policy": placement.policy,
        "context": placement.context,
        "batch": placement.batch,
        "num_ranks": placement.num_ranks,
        "devices": devices,
    }


def print_placement(placement: Placement, console: Console) -> None:
    """Print the memory of every device, and how to start the processes."""
    is_split = placement.by == "tensor" and placement.num_ranks > 1
    table = make_table("device", "layers", "total", "of", "in detail")
    for stage in placement.stages:
        layers = f"{stage.first_layer}–{stage.last_layer}" + (" (split)" if is_split else "")
        details = [
            f"{name.replace('_', ' ')} {to_size(num_bytes)}"
            for name, num_bytes in asdict(stage.memory).items()
            if num_bytes
        ]
        table.add_data(
            stage.device,
            layers,
            to_size(stage.memory.total),
            to_size(stage.capacity),
            ", ".join(details),
        )
    console.print(table)
    start = "one process"
    if placement.num_ranks > 1:
        start = f"torchrun --nproc-per-node {placement.num_ranks}"
    console.print(
        f"by {placement.by}, {start}; {placement.context:,} tokens, batch {placement.batch},"
        f" policy {placement.policy}"
    )
