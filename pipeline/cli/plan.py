"""`mmerge plan` and `mmerge inspect`: what a run would do, and what an input of it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.options import BlockOption, JsonOption, RecipeArgument
from mmerge.pipeline.cli.output import out
from mmerge.workers.runtime.lazy_torch import postpone_torch

if TYPE_CHECKING:
    from mmerge.pipeline.build.simulation import Simulation
    from mmerge.pipeline.planning.plan import MergePlan


def plan(
    recipe: RecipeArgument,
    as_json: JsonOption = False,
    block_entries: BlockOption = None,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", help="list the shards that a run would compute, and why"
        ),
    ] = True,
    scan: Annotated[
        bool,
        typer.Option("--scan", help="scan inputs that are new, so that no shard stays undecided"),
    ] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            help="simulate the run on a cluster of so many nodes: time, bottleneck, bytes, memory",
            show_default=False,
        ),
    ] = None,
    cores: Annotated[int, typer.Option("--cores", min=1, help="with --nodes: cores per node")] = 16,
    read_gbps: Annotated[
        float,
        typer.Option(
            "--read-gbps", min=0.001, help="with --nodes: gigabytes per second that a node reads"
        ),
    ] = 1.0,
    write_gbps: Annotated[
        float,
        typer.Option(
            "--write-gbps", min=0.001, help="with --nodes: gigabytes per second that a node writes"
        ),
    ] = 1.0,
    node_memory: Annotated[
        float | None,
        typer.Option(
            "--node-memory",
            metavar="GB",
            help="with --nodes: memory per node [default: unlimited]",
            show_default=False,
        ),
    ] = None,
    rates_from: Annotated[
        str | None,
        typer.Option(
            "--rates-from",
            metavar="URI",
            help=(
                "with --nodes: a composite whose last run measured bytes per second and core"
                " [default: reference rates]"
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a run would read, write, hold in memory and compute, without running it.

    Reads the headers of the checkpoints and the store. Writes nothing, except with --scan.
    """
    postpone_torch(num_threads=1)
    from mmerge.pipeline.build.forecast import forecast_to_json, make_forecast
    from mmerge.pipeline.views.plan_report import (
        plan_to_json,
        print_forecast,
        print_plan,
        print_simulation,
        simulation_to_json,
    )

    merge_plan = make_plan_of(recipe, block_entries=block_entries)
    simulation = None
    if nodes is not None:
        simulation = _simulate(
            merge_plan,
            num_nodes=nodes,
            num_cores=cores,
            read_gbps=read_gbps,
            write_gbps=write_gbps,
            node_memory=node_memory,
            rates_from=rates_from,
        )
    forecast = make_forecast(merge_plan, scan=scan) if reuse or scan else None
    if as_json:
        document = plan_to_json(merge_plan)
        if forecast is not None:
            document["forecast"] = forecast_to_json(forecast)
        if simulation is not None:
            document["simulation"] = simulation_to_json(simulation)
        print(json.dumps(document, indent=2))
        return
    print_plan(merge_plan, out)
    if forecast is not None:
        print_forecast(forecast, out)
    if simulation is not None:
        print_simulation(simulation, out)


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="checkpoint or LoRA adapter: a folder or a URI")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="PATH",
            help="base model: say whether the checkpoint merges with it, and all that differs",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds, and whether it merges with a base.

    Reads configurations, tokenizers and headers alone.
    """
    postpone_torch(num_threads=1)
    from mmerge.pipeline.planning.inspection import inspect_checkpoint
    from mmerge.pipeline.views.inspection_report import inspection_to_json, print_inspection

    inspection = inspect_checkpoint(path, base=base)
    if as_json:
        print(json.dumps(inspection_to_json(inspection), indent=2))
    else:
        print_inspection(inspection, out)


def make_plan_of(
    recipe: Path, *, block_entries: int | None, memory_bytes: int | None = None
) -> MergePlan:
    """Return the plan of a recipe file. Raises RecipeError and what `make_plan` raises."""
    from mmerge.pipeline.planning.plan import make_plan
    from mmerge.pipeline.recipes.parsing import read_recipe

    try:
        return make_plan(
            read_recipe(recipe), block_entries=block_entries, memory_bytes=memory_bytes
        )
    except ValueError as error:  # --block-entries
        raise RecipeError(str(error)) from error


def _simulate(
    merge_plan: MergePlan,
    *,
    num_nodes: int,
    num_cores: int,
    read_gbps: float,
    write_gbps: float,
    node_memory: float | None,
    rates_from: str | None,
) -> Simulation:
    """Simulate a plan on a cluster.

    Raises:
        MmergeError: a node has too little memory, or `rates_from` has no measured run.
    """
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.build.simulation import simulate, to_rates
    from mmerge.pipeline.execution.simulated_cluster import GB, Nodes
    from mmerge.pipeline.views.run_status import find_runs

    rates = None
    if rates_from is not None:
        store_uri, name = split_uri(rates_from)
        rates = to_rates(find_runs(open_store(store_uri), name)[-1])
    memory_bytes = None if node_memory is None else round(node_memory * GB)
    nodes = Nodes(num_nodes, num_cores, read_gbps * GB, write_gbps * GB, memory_bytes)
    return simulate(merge_plan, nodes, rates=rates)
