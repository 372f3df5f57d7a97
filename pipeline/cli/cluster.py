"""The commands about clusters: submit, jobs, status; and the record that every run keeps of itself."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import MmergeError, RecipeError, StoreError
from mmerge.pipeline.cli.options import JsonOption

if TYPE_CHECKING:
    from mmerge.manifests.stores.base import Store
    from mmerge.pipeline.build.simulation import Simulation
    from mmerge.pipeline.execution.jobs import Job
    from mmerge.pipeline.monitoring.progress import Progress
    from mmerge.pipeline.monitoring.run_records import RunStatus
    from mmerge.pipeline.planning.plan import MergePlan

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

ExclusiveOption = Annotated[
    bool,
    typer.Option(
        "--exclusive",
        help=(
            "do nothing, and exit with 0, while another run of this composite lives; for schedules"
        ),
    ),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option(
        "--task-deadline",
        metavar="SECONDS",
        min=1,
        help=(
            "what one task may take on Ray before a second attempt starts on another node;"
            " estimated if absent"
        ),
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help="the cluster's dashboard; RAY_API_SERVER_ADDRESS or RAY_ADDRESS if absent",
        show_default=False,
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        help="simulate the run on so many nodes: time, limit, bytes and memory per node",
        show_default=False,
    ),
]
CoresOption = Annotated[int, typer.Option("--cores", min=1, help="cores per node, with --nodes")]
ReadOption = Annotated[
    float,
    typer.Option(
        "--read-gbps",
        min=0.001,
        help="gigabytes (10⁹ bytes) per second that a node reads, with --nodes",
    ),
]
WriteOption = Annotated[
    float,
    typer.Option(
        "--write-gbps", min=0.001, help="gigabytes per second that a node writes, with --nodes"
    ),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--node-memory",
        metavar="GB",
        help="memory per node, with --nodes; no limit if absent",
        show_default=False,
    ),
]
RatesOption = Annotated[
    str | None,
    typer.Option(
        "--rates-from",
        metavar="URI",
        help="a composite whose last run measured bytes per second and core, with --nodes",
        show_default=False,
    ),
]


@contextmanager
def recorded(
    plan: MergePlan, progress: Progress, *, exclusive: bool, metrics: bool
) -> Iterator[Progress]:
    """Record a run in its store while the context lasts; yields what is to be told of its progress.

    Raises:
        RunUnderWay: `exclusive`, and another run of the same composite lives.
        StoreError: the store cannot be written.
    """
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.monitoring.progress import SeveralProgress
    from mmerge.pipeline.monitoring.run_records import RunRecord, begin_run

    store = open_store(plan.recipe.output, create=True)
    try:
        begun = begin_run(store, plan.recipe.name, exclusive=exclusive)
    except StoreError as error:
        text = Exception.__str__(error)
        raise StoreError(f"{text}. Choose another 'output' or grant write access") from error
    with RunRecord(store, begun) as record:
        parts: list[Progress] = [progress, record]
        if metrics:
            from mmerge.pipeline.monitoring.metrics import MetricsProgress

            parts.append(MetricsProgress(plan.recipe.name))
        yield SeveralProgress(parts)


def simulate_plan(
    plan: MergePlan,
    *,
    nodes: int,
    cores: int,
    read_gbps: float,
    write_gbps: float,
    node_memory: float | None,
    rates_from: str | None,
) -> Simulation:
    """Return the simulated run of a plan. Raises MmergeError where a node is too small, or no run
    was measured.
    """
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.build.simulation import simulate, to_rates
    from mmerge.pipeline.execution.simulated_cluster import GB, Nodes

    rates = None
    if rates_from is not None:
        store_uri, name = split_uri(rates_from)
        rates = to_rates(_find_runs(open_store(store_uri), name, None)[-1])
    memory = None if node_memory is None else round(node_memory * GB)
    return simulate(plan, Nodes(nodes, cores, read_gbps * GB, write_gbps * GB, memory), rates=rates)


def simulation_to_json(found: Simulation) -> dict[str, Any]:
    """Return a simulation as JSON; seconds, bytes, bytes per second."""
    return dataclasses.asdict(found)


def print_simulation(found: Simulation) -> None:
    """Print a simulation: wall time, what limits it, bytes and memory per node."""
    from mmerge.pipeline.monitoring.progress import to_size

    nodes = found.nodes
    out.print(
        f"\n[bold]on {nodes.num_nodes} nodes with {nodes.num_cores} cores[/] (simulated, nothing"
        " there already)",
        highlight=False,
    )
    start = (
        f", {found.start_seconds:.1f} s of them until workers are there"
        if found.start_seconds >= 0.05
        else ""
    )
    out.print(
        f"  {found.seconds:.0f} s for {found.num_tasks} tasks{start}; limited by {found.limit}",
        highlight=False,
    )
    out.print(
        f"  a node reads at most {to_size(found.bytes_read_per_node)}, writes"
        f" {to_size(found.bytes_written_per_node)}, needs {to_size(found.memory_per_node)} of"
        " memory",
        highlight=False,
    )
    table = Table("phase", box=None, header_style="bold", pad_edge=False)
    table.add_column("tasks", justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("limited by")
    for phase in found.phases:
        table.add_row(phase.name, str(phase.num_tasks), f"{phase.seconds:.1f}", phase.limit)
    out.print(table)


def submit(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="the recipe; paths in it are those of the cluster's nodes"
        ),
    ],
    address: AddressOption = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="stream the job's log and return its exit code")
    ] = True,
    if_running: Annotated[
        str,
        typer.Option(
            "--if-running",
            metavar="follow|skip|fail",
            help="what to do while a job of the same recipe lives",
        ),
    ] = "follow",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="compute everything again, whatever the store has")
    ] = False,
    task_deadline: DeadlineOption = None,
    block_entries: Annotated[
        int | None, typer.Option("--block-entries", help="as for 'run'", show_default=False)
    ] = None,
) -> None:
    """Build a recipe as a job of a Ray cluster: this package goes along, the log comes back. Ctrl-C
    leaves the job running.
    """
    from mmerge.pipeline.execution.jobs import Jobs, to_exit_code

    if if_running not in ("follow", "skip", "fail"):
        raise RecipeError(f"--if-running: expected 'follow', 'skip' or 'fail', got {if_running!r}")
    cluster = Jobs(address)
    options = ["--fresh"] if fresh else []
    options += ["--task-deadline", str(task_deadline)] if task_deadline is not None else []
    options += ["--block-entries", str(block_entries)] if block_entries is not None else []
    job, is_new = cluster.submit(recipe, options=options, if_running=if_running)  # type: ignore[arg-type]  # checked above
    if not is_new:
        err.print(f"job {job.id} builds this recipe already", highlight=False)
        if if_running == "skip":
            return
    if not wait:
        print(job.id)
        return
    err.print(
        f"job {job.id}{' submitted' if is_new else ''}; Ctrl-C stops following it, 'ray job stop"
        f" {job.id}' ends it",
        highlight=False,
    )
    try:
        ended = cluster.follow(job.id, _write)
    except KeyboardInterrupt:
        err.print(
            f"job {job.id} goes on: 'mmerge status {job.id}' tells how far it is", highlight=False
        )
        raise typer.Exit(
            130
        ) from None  # not 'from' the interrupt: nothing was interrupted but the log
    code = to_exit_code(ended)
    if code:
        err.print(
            f"[red]job {ended.id} {ended.status.lower()}[/]: {escape(ended.message)}",
            highlight=False,
        )
    raise typer.Exit(code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def jobs(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List the builds among the jobs of a Ray cluster."""
    from mmerge.pipeline.execution.jobs import Jobs

    found = Jobs(address).list_builds()
    if as_json:
        print(json.dumps([vars(job) for job in found], indent=2))
        return
    table = Table(
        "job", "status", "composite", "started", box=None, header_style="bold", pad_edge=False
    )
    table.add_column("seconds", justify="right")
    table.add_column("exit code", justify="right")
    for job in found:
        table.add_row(
            job.id,
            job.status,
            f"{job.store}#{job.recipe}",
            _to_time(job.started),
            _to_duration(job),
            str(job.exit_code if job.exit_code is not None else "-"),
        )
    out.print(table)


def _to_time(seconds: float | None) -> str:
    return (
        datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
        if seconds
        else "-"
    )


def _to_duration(job: Job) -> str:
    return f"{(job.ended or time.time()) - job.started:.0f}" if job.started else "-"


def status(
    what: Annotated[
        str,
        typer.Argument(metavar="URI|JOB", help="a composite (STORE or STORE#NAME), or a job's id"),
    ],
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell how far the last run of a composite is, from any machine that can read its store. Exit
    code 1 if it failed.
    """
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_store

    job = None
    if "/" not in what and "#" not in what and not Path(what).is_dir():
        from mmerge.pipeline.execution.jobs import Jobs

        job = Jobs(address).find(what)
        what = f"{job.store}#{job.recipe}"
    store_uri, fragment = split_uri(what)
    found = _find_runs(open_store(store_uri), fragment, job)
    if as_json:
        print(json.dumps([run.model_dump(mode="json") for run in found], indent=2))
    else:
        for run in found:
            _print_run(run, job)
    if any(run.state == "failed" for run in found):
        raise typer.Exit(1)


def _find_runs(store: Store, name: str, job: Job | None) -> list[RunStatus]:
    """Return the last run of each composite in a store, of one of them, or of one job."""
    from mmerge.pipeline.monitoring.run_records import list_run_names, list_runs, read_status

    found = []
    for known in [name] if name else list_run_names(store):
        numbers = list_runs(store, known)
        runs = (read_status(store, known, number) for number in reversed(numbers))
        last = next((run for run in runs if job is None or run.job == job.id), None)
        if last:
            found.append(last)
    if not found:
        waiting = f"; job {job.id} is {job.status.lower()}: {job.message}" if job else ""
        raise MmergeError(
            f"{store.uri}: no run{' of ' + name if name else ''} is recorded here{waiting}"
        )
    return found


def _print_run(run: RunStatus, job: Job | None) -> None:
    from mmerge.pipeline.monitoring.progress import to_size

    build = f", build {run.build[:SHOWN_DIGITS]}" if run.build else ""
    color = {"running": "yellow", "finished": "green"}.get(run.state, "red")
    out.print(
        f"[bold]{escape(run.name)}[/] run {run.number}: [{color}]{run.state}[/]{build}",
        highlight=False,
    )
    where = f"job {run.job} " if run.job else f"process {run.pid} "
    out.print(
        f"  {where}on {run.host}, since {run.started}, last heard of {run.updated}", highlight=False
    )
    if job is not None and not job.is_alive and run.state == "running":
        out.print(
            f"  [red]its job is {job.status.lower()}[/]: {escape(job.message)}", highlight=False
        )
    table = Table("phase", box=None, header_style="bold", pad_edge=False)
    for column in ("done", "reused", "failed", "to do", "read", "written", "task seconds"):
        table.add_column(column, justify="right")
    for name, phase in run.phases.items():
        left = phase.num_tasks - phase.num_done - phase.num_failed
        share = f" of {to_size(phase.num_bytes)}" if left else ""
        table.add_row(
            name, str(phase.num_done), str(phase.num_reused), str(phase.num_failed), str(left),
            to_size(phase.bytes_read) + share, to_size(phase.bytes_written), f"{phase.seconds:.1f}",
        )  # fmt: skip
    out.print(table)
    for failure in run.failures:
        out.print(f"  [red]{escape(failure)}[/]", highlight=False)
    if run.message and not run.failures:
        out.print(f"  {escape(run.message)}", highlight=False)
