"""Runs and jobs as tables: what `mmerge status` and `mmerge jobs` show."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timezone

from rich.console import Console

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import ManifestError, MmergeError
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.execution.jobs import Job
from mmerge.pipeline.monitoring.printable import escape
from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.monitoring.run_records import (
    RunStatus,
    list_run_names,
    list_runs,
    read_status,
)
from mmerge.pipeline.views.tables import make_table

log = logging.getLogger("mmerge.store")
_STATE_COLORS = {"running": "yellow", "finished": "green"}


def find_runs(store: Store, name: str, *, job: Job | None = None) -> list[RunStatus]:
    """Return the last run of every composite in a store, or of one.

    Args:
        store: where the runs are recorded.
        name: of the composite; empty for all.
        job: only runs of this job, if given.

    Raises:
        MmergeError: no such run is recorded.
    """
    runs = []
    for composite_name in [name] if name else list_run_names(store):
        last_run = _find_last_run(store, composite_name, job)
        if last_run is not None:
            runs.append(last_run)
    if not runs:
        subject = f" of {name!r}" if name else ""
        state = f"; job {job.id} is {job.status.lower()}: {job.message}" if job else ""
        raise MmergeError(f"{store.uri}: records no run{subject}{state}")
    return runs


def _find_last_run(store: Store, name: str, job: Job | None) -> RunStatus | None:
    for number in reversed(list_runs(store, name)):
        try:
            run = read_status(store, name, number)
        except ManifestError as error:
            log.warning("%s", Exception.__str__(error))
            continue
        if job is None or run.job == job.id:
            return run
    return None


def print_status(run: RunStatus, console: Console, *, job: Job | None) -> None:
    """Print the state of a run, its phases and its failures."""
    build = f", build {run.build[:SHOWN_DIGITS]}" if run.build else ""
    color = _STATE_COLORS.get(run.state, "red")
    console.print(
        f"[bold]{escape(run.name)}[/] run {run.number}: [{color}]{escape(run.state)}[/]{build}",
        highlight=False,
    )
    process = f"job {run.job}" if run.job else f"process {run.pid}"
    console.print(
        "  " + escape(f"{process} on {run.host}, started {run.started}, last update {run.updated}"),
        highlight=False,
    )
    if job is not None and not job.is_alive and run.state == "running":
        console.print(
            f"  [red]its job is {job.status.lower()}[/]: {escape(job.message)}", highlight=False
        )
    numbers = ("done", "reused", "failed", "remaining", "read", "written", "task seconds")
    table = make_table("phase", numbers=numbers)
    for name, phase in run.phases.items():
        num_remaining = phase.num_tasks - phase.num_done - phase.num_failed
        total = f" of {to_size(phase.num_bytes)}" if num_remaining else ""
        table.add_data(
            name,
            str(phase.num_done),
            str(phase.num_reused),
            str(phase.num_failed),
            str(num_remaining),
            to_size(phase.bytes_read) + total,
            to_size(phase.bytes_written),
            f"{phase.seconds:.1f}",
        )
    console.print(table)
    for failure in run.failures:
        console.print(f"  [red]{escape(failure)}[/]", highlight=False)
    if run.message and not run.failures:
        console.print(f"  {escape(run.message)}", highlight=False)


def print_jobs(jobs: Sequence[Job], console: Console) -> None:
    """Print jobs, their composites and how long they took."""
    table = make_table("job", "status", "composite", "started", numbers=("seconds", "exit code"))
    for job in jobs:
        table.add_data(
            job.id,
            job.status,
            f"{job.store}#{job.recipe}",
            _to_time(job.started),
            _to_duration(job),
            "-" if job.exit_code is None else str(job.exit_code),
        )
    console.print(table)


def _to_time(seconds: float | None) -> str:
    if not seconds:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _to_duration(job: Job) -> str:
    return f"{(job.ended or time.time()) - job.started:.0f}" if job.started else "-"
