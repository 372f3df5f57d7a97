"""Tasks that ask a model prompts, and running those whose answers are not stored yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import TaskErrors
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.evaluation.models import Model
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.workers.modalities.prompt import QUESTION, Part
from mmerge.workers.task import AnswerTask, TaskResult

ANSWERS_VERSION = 1
"""Part of every answer's key: raised when equal prompts may get other answers than before."""
PROCESS_BYTES = 500_000_000
"""Memory of a worker process beside the model: the libraries."""
QUESTIONS_PER_TASK = 64
"""What is lost when a run is killed, and the unit that Ray distributes."""


@dataclass(frozen=True)
class Settings:
    """How questions are asked."""

    max_new_tokens: int = 64
    batch_size: int = 16
    encoders: tuple[str, ...] = ()
    """Functions "module:function" that register encoders."""
    device: str = "cpu"


def make_answer_task(
    model: Model,
    prompts: Sequence[tuple[Part, ...]],
    *,
    shard: str,
    settings: Settings,
    targets: Sequence[tuple[int, ...]] | None = None,
    fresh: bool = False,
) -> AnswerTask:
    """Return the task of asking a model some prompts.

    Its key is the digest of the build, the prompts, the identity of their files and the settings.

    Args:
        model: the model.
        prompts: the prompts.
        shard: name of the task in progress and errors.
        settings: how they are asked.
        targets: token ids of an answer per prompt, to score instead of generating answers.
        fresh: ask again, even where the store has the answer.
    """
    described_prompts = [[[part.kind, _identify(part)] for part in prompt] for prompt in prompts]
    described_settings = [
        settings.max_new_tokens,
        list(settings.encoders),
        settings.device,
        None if targets is None else [list(target) for target in targets],
    ]
    key = digest_json(
        [ANSWERS_VERSION, model.build, model.expert, described_prompts, described_settings]
    )
    return AnswerTask(
        key=key,
        shard=shard,
        model=model.uri,
        expert=model.expert,
        prompts=tuple(prompts),
        targets=None if targets is None else tuple(targets),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        encoders=settings.encoders,
        device=settings.device,
        num_bytes=model.num_bytes,
        peak_bytes=2 * model.num_bytes + PROCESS_BYTES,
        fresh=fresh,
    )


def _identify(part: Part) -> Any:
    """Return what an answer depends on: a part's text, or path, size and time of its file."""
    if part.kind in ("text", QUESTION) or not isinstance(part.value, str):
        return part.value
    try:
        status = Path(part.value).stat()
    except OSError:
        return part.value
    return [part.value, status.st_size, status.st_mtime_ns]


def run_answer_tasks(
    tasks: Sequence[AnswerTask],
    store: Store,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> None:
    """Run the tasks whose answers are not in the store yet.

    Raises:
        MmergeError: the failure of the only task that failed.
        TaskErrors: all failures, if there are several.
    """
    from mmerge.workers.tasks.answer import has_answers  # imports transformers

    executor, progress = executor or SerialExecutor(), progress or LogProgress()
    unique_tasks = {task.key: task for task in tasks}
    pending_tasks = [
        task for task in unique_tasks.values() if fresh or not has_answers(store, task.key)
    ]
    progress.begin(
        "answer",
        num_bytes=sum(task.num_bytes for task in pending_tasks),
        num_tasks=len(pending_tasks),
        num_reused=len(unique_tasks) - len(pending_tasks),
    )
    failures: list[Exception] = []
    with closing(executor.run(pending_tasks, store.uri)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, TaskResult):
                progress.advance("answer", outcome)
            else:
                failures.append(outcome)
                progress.fail("answer", task.shard, outcome)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise TaskErrors(sorted(str(failure) for failure in failures))
