"""The commands that build: plan says what a run would do, run does it."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.cluster import (
    CoresOption,
    DeadlineOption,
    ExclusiveOption,
    MemoryOption,
    NodesOption,
    RatesOption,
    ReadOption,
    WriteOption,
    print_simulation,
    recorded,
    simulate_plan,
    simulation_to_json,
)
from mmerge.pipeline.cli.options import JsonOption
from mmerge.workers.runtime.lazy_torch import postpone_torch
from mmerge.workers.tasks.worker_startup import import_numba, load_kernels

if TYPE_CHECKING:
    from mmerge.pipeline.execution.executor import Executor
    from mmerge.pipeline.execution.open import ExecutorName
    from mmerge.pipeline.planning.plan import MergePlan

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

RecipeArgument = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="the recipe, a YAML file ('mmerge schema' describes it)"),
]
BlockOption = Annotated[
    int | None,
    typer.Option(
        "--block-entries",
        help="entries of a tensor in memory at once, a multiple of 65536; no effect on the result",
        show_default=False,
    ),
]


def _make_plan(
    recipe: Path, block_entries: int | None, memory_bytes: int | None = None
) -> MergePlan:
    from mmerge.pipeline.planning.plan import make_plan
    from mmerge.pipeline.recipes.recipe import read_recipe

    try:
        return make_plan(
            read_recipe(recipe), block_entries=block_entries, memory_bytes=memory_bytes
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error


def parse_size(text: str) -> int:
    """Return the bytes that a size like 1.5GB, 800MB or 2GiB names. Raises RecipeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|TB|MiB|GiB|TiB)\s*", text)
    if not match:
        raise RecipeError(f"--memory: expected a size such as 1.5GB or 800MB, got {text!r}")
    base = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * base ** {"M": 2, "G": 3, "T": 4}[match[2][0]])


def plan(
    recipe: RecipeArgument,
    as_json: JsonOption = False,
    block_entries: BlockOption = None,
    reuse: Annotated[
        bool,
        typer.Option("--reuse/--no-reuse", help="say which shards a run would compute, and why"),
    ] = True,
    survey: Annotated[
        bool,
        typer.Option("--survey", help="read inputs that changed, so that nothing stays unknown"),
    ] = False,
    nodes: NodesOption = None,
    cores: CoresOption = 16,
    read_gbps: ReadOption = 1.0,
    write_gbps: WriteOption = 1.0,
    node_memory: MemoryOption = None,
    rates_from: RatesOption = None,
) -> None:
    """Show what a run would read, write and hold in memory, and which shards it would compute.
    Reads headers and the store.
    """
    postpone_torch(num_threads=1)
    import_numba()
    from mmerge.pipeline.build.forecast import forecast_to_json, make_forecast
    from mmerge.pipeline.cli.store import print_forecast
    from mmerge.pipeline.views.report import plan_to_json, print_plan

    made = _make_plan(recipe, block_entries)
    simulation = None
    if nodes is not None:
        simulation = simulate_plan(
            made,
            nodes=nodes,
            cores=cores,
            read_gbps=read_gbps,
            write_gbps=write_gbps,
            node_memory=node_memory,
            rates_from=rates_from,
        )
    found = make_forecast(made, scan=survey) if reuse or survey else None
    if as_json:
        more = {"forecast": forecast_to_json(found)} if found else {}
        more |= {"simulation": simulation_to_json(simulation)} if simulation else {}
        print(json.dumps(plan_to_json(made) | more, indent=2))
        return
    print_plan(made, out)
    if found:
        print_forecast(found)
    if simulation:
        print_simulation(simulation)


def run(
    recipe: RecipeArgument,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="ray|processes|serial",
            help=(
                "where tasks run: on Ray, in processes of this command, one per core (the quickest"
                " on one machine), or in threads of this process"
            ),
        ),
    ] = "ray",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="address of a Ray cluster; a local Ray is started without one",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="tasks at once on this machine, one core each; all cores if absent",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help=(
                "what a run may take on this machine, as 1.5GB or 800MB: fewer tasks at once,"
                " smaller blocks"
            ),
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="compute everything again, whatever the store has")
    ] = False,
    exclusive: ExclusiveOption = False,
    task_deadline: DeadlineOption = None,
    block_entries: BlockOption = None,
) -> None:
    """Build the composite of a recipe. A killed run continues; a second run of the same recipe does
    nothing and says so.
    """
    if executor not in ("ray", "processes", "serial"):
        raise RecipeError(f"--executor: expected 'ray', 'processes' or 'serial', got {executor!r}")
    name = cast("ExecutorName", executor)
    if name != "ray":
        postpone_torch(
            num_threads=1
        )  # Ray cannot send a function that names a stand-in to its workers
        load_kernels()
    from mmerge.pipeline.build.run import run as run_plan
    from mmerge.pipeline.execution.open import open_executor
    from mmerge.pipeline.monitoring.progress import show_progress
    from mmerge.pipeline.monitoring.run_records import RunUnderWay
    from mmerge.pipeline.views.report import print_run

    memory_bytes = parse_size(memory) if memory is not None else None
    with ExitStack() as closing:

        def open_it(peak_bytes: int) -> Executor:
            opened = open_executor(
                name,
                address=address,
                num_workers=workers,
                memory_bytes=memory_bytes,
                peak_bytes=peak_bytes,
                deadline_seconds=task_deadline,
            )
            closing.callback(opened.close)
            return opened

        forked = open_it(0) if name == "processes" else None  # before a plan opens stores
        made = _make_plan(recipe, block_entries, memory_bytes)
        where = forked or open_it(made.peak_bytes)
        try:
            with (
                show_progress(err) as shown,
                recorded(made, shown, exclusive=exclusive, metrics=name == "ray") as progress,
            ):
                report = run_plan(made, executor=where, progress=progress, fresh=fresh)
        except RunUnderWay as other:
            out.print(f"[yellow]nothing done[/]: {escape(str(other))}", highlight=False)
            return
    print_run(report, out)
