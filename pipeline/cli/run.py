"""`mmerge run`: build the composite of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.manifests.errors import StoreError
from mmerge.pipeline.cli.options import (
    EXECUTORS,
    BlockOption,
    BuildOptions,
    DeadlineOption,
    ExclusiveOption,
    ExecutorOption,
    FreshOption,
    OnePassOption,
    RayAddressOption,
    RecipeArgument,
    VerifyReusedOption,
    WorkersOption,
    check_choice,
    parse_size,
)
from mmerge.pipeline.cli.output import err, out
from mmerge.pipeline.cli.plan import make_plan_of
from mmerge.pipeline.monitoring.printable import escape
from mmerge.workers.runtime.lazy_torch import postpone_torch

if TYPE_CHECKING:
    from mmerge.pipeline.execution.executor import Executor
    from mmerge.pipeline.monitoring.progress import Progress
    from mmerge.pipeline.planning.plan import MergePlan


def run(
    recipe: RecipeArgument,
    executor: ExecutorOption = "ray",
    address: RayAddressOption = None,
    workers: WorkersOption = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help=(
                "memory limit of the run on this machine, as 1.5GB or 800MB: fewer tasks at once,"
                " smaller blocks [default: no limit]"
            ),
            show_default=False,
        ),
    ] = None,
    fresh: FreshOption = False,
    verify_reused: VerifyReusedOption = False,
    one_pass: OnePassOption = False,
    exclusive: ExclusiveOption = False,
    task_deadline: DeadlineOption = None,
    block_entries: BlockOption = None,
) -> None:
    """Build the composite of a recipe.

    An interrupted run continues when it is started again. A second run of an unchanged recipe finds
    its build in the store and does nothing.
    """
    name = check_choice(executor, EXECUTORS, option="--executor")
    if name != "ray":
        # Ray cannot pickle functions that refer to the placeholder of torch.
        postpone_torch(num_threads=1)
    from mmerge.pipeline.build.run import run as run_plan
    from mmerge.pipeline.execution.open import open_executor
    from mmerge.pipeline.monitoring.progress import show_progress
    from mmerge.pipeline.monitoring.run_records import RunUnderWay
    from mmerge.pipeline.views.build_report import print_run
    from mmerge.pipeline.views.plan_report import print_warnings

    memory_bytes = None if memory is None else parse_size(memory, option="--memory")
    options = BuildOptions(fresh, verify_reused, one_pass, exclusive, task_deadline, block_entries)
    with ExitStack() as open_executors:

        def open_for(peak_bytes: int) -> Executor:
            opened = open_executor(
                name,
                address=address,
                num_workers=workers,
                memory_bytes=memory_bytes,
                peak_bytes=peak_bytes,
                deadline_seconds=options.task_deadline,
            )
            open_executors.callback(opened.close)
            return opened

        # Worker processes must be forked before a plan opens stores, whose library starts threads.
        process_executor = open_for(0) if name == "processes" else None
        merge_plan = make_plan_of(
            recipe, block_entries=options.block_entries, memory_bytes=memory_bytes
        )
        print_warnings(merge_plan, err)
        task_executor = process_executor or open_for(merge_plan.peak_bytes)
        try:
            with (
                show_progress(err) as display,
                _record_run(
                    merge_plan, display, exclusive=options.exclusive, metrics=name == "ray"
                ) as progress,
            ):
                report = run_plan(
                    merge_plan,
                    executor=task_executor,
                    progress=progress,
                    fresh=options.fresh,
                    verify_reused=options.verify_reused,
                    one_pass=options.one_pass,
                )
        except RunUnderWay as active:
            out.print(f"[yellow]nothing done[/]: {escape(str(active))}", highlight=False)
            return
    print_run(report, out)


@contextmanager
def _record_run(
    plan: MergePlan, display: Progress, *, exclusive: bool, metrics: bool
) -> Iterator[Progress]:
    """Record a run in its store while the context lasts.

    Yields:
        The progress to report to: it updates the display, the record and the metrics.

    Raises:
        RunUnderWay: `exclusive`, and another run of the same composite is active.
        StoreError: the store cannot be written.
    """
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.monitoring.progress import SeveralProgress
    from mmerge.pipeline.monitoring.run_records import RunRecord, begin_run

    store = open_store(plan.recipe.output, create=True)
    try:
        status = begin_run(store, plan.recipe.name, exclusive=exclusive)
    except StoreError as error:
        text = Exception.__str__(error)
        raise StoreError(f"{text}. Choose another 'output' or grant write access") from error
    with RunRecord(store, status) as record:
        parts: list[Progress] = [display, record]
        if metrics:
            from mmerge.pipeline.monitoring.metrics import MetricsProgress

            parts.append(MetricsProgress(plan.recipe.name))
        yield SeveralProgress(parts)
