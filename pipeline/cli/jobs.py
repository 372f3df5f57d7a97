"""Builds on a cluster: `mmerge submit`, `mmerge jobs`, `mmerge status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.pipeline.cli.options import (
    BlockOption,
    BuildOptions,
    DeadlineOption,
    ExclusiveOption,
    FreshOption,
    JsonOption,
    OnePassOption,
    VerifyReusedOption,
    check_choice,
)
from mmerge.pipeline.cli.output import err, out, print_text
from mmerge.pipeline.monitoring.printable import escape

if TYPE_CHECKING:
    from mmerge.pipeline.execution.jobs import IfRunning

IF_RUNNING: tuple[IfRunning, ...] = ("follow", "skip", "fail")

DashboardOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help=(
            "dashboard of the Ray cluster [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this"
            " machine]"
        ),
        show_default=False,
    ),
]


def submit(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="recipe file (YAML); its paths are paths on the cluster's nodes"
        ),
    ],
    address: DashboardOption = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="stream the job's log and return its exit code")
    ] = True,
    if_running: Annotated[
        str,
        typer.Option(
            "--if-running",
            metavar="follow|skip|fail",
            help="what to do if a job of this recipe is active",
        ),
    ] = "follow",
    fresh: FreshOption = False,
    verify_reused: VerifyReusedOption = False,
    one_pass: OnePassOption = False,
    exclusive: ExclusiveOption = False,
    task_deadline: DeadlineOption = None,
    block_entries: BlockOption = None,
) -> None:
    """Build a recipe as a job of a Ray cluster: upload this package, stream the log back.

    Ctrl-C stops the log, not the job. The options of 'mmerge run' that do not concern this machine
    are passed to the job.
    """
    from mmerge.pipeline.execution.jobs import Jobs, to_exit_code

    policy = check_choice(if_running, IF_RUNNING, option="--if-running")
    options = BuildOptions(fresh, verify_reused, one_pass, exclusive, task_deadline, block_entries)
    cluster = Jobs(address)
    job, is_new = cluster.submit(recipe, options=options.to_arguments(), if_running=policy)
    if not is_new:
        err.print(f"job {job.id} already builds this recipe", highlight=False)
        if policy == "skip":
            return
    if not wait:
        print(job.id)
        return
    state = "submitted; " if is_new else ""
    err.print(
        f"job {job.id}: {state}Ctrl-C stops the log, 'ray job stop {job.id}' stops the job",
        highlight=False,
    )
    try:
        ended_job = cluster.follow(job.id, _write)
    except KeyboardInterrupt:
        err.print(
            f"job {job.id} continues; 'mmerge status {job.id}' shows its progress", highlight=False
        )
        raise typer.Exit(130) from None  # the log was interrupted, not the build
    code = to_exit_code(ended_job)
    if code:
        err.print(
            f"[red]job {ended_job.id} {ended_job.status.lower()}[/]: {escape(ended_job.message)}",
            highlight=False,
        )
    raise typer.Exit(code)


def _write(text: str) -> None:
    print_text(text, end="")


def jobs(address: DashboardOption = None, as_json: JsonOption = False) -> None:
    """List the builds among the jobs of a Ray cluster."""
    from mmerge.pipeline.execution.jobs import Jobs
    from mmerge.pipeline.views.run_status import print_jobs

    builds = Jobs(address).list_builds()
    if as_json:
        print(json.dumps([vars(job) for job in builds], indent=2))
    else:
        print_jobs(builds, out)


def status(
    target: Annotated[
        str,
        typer.Argument(metavar="URI|JOB", help="composite (STORE or STORE#NAME), or id of a job"),
    ],
    address: DashboardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the progress of a composite's last run, from any machine that can read its store.

    The exit code is 1 if the run failed.
    """
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.views.run_status import find_runs, print_status

    job = None
    if "/" not in target and "#" not in target and not Path(target).is_dir():
        from mmerge.pipeline.execution.jobs import Jobs

        job = Jobs(address).find(target)
        target = f"{job.store}#{job.recipe}"
    store_uri, name = split_uri(target)
    runs = find_runs(open_store(store_uri), name, job=job)
    if as_json:
        print(json.dumps([run.model_dump(mode="json") for run in runs], indent=2))
    else:
        for run in runs:
            print_status(run, out, job=job)
    if any(run.state == "failed" for run in runs):
        raise typer.Exit(1)
