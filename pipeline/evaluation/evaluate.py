"""Ask models the same questions, score the answers, and compare with an original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.evaluation.answer_tasks import (
    QUESTIONS_PER_TASK,
    Settings,
    make_answer_task,
    run_answer_tasks,
)
from mmerge.pipeline.evaluation.models import Model, check_media, find_templates
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.evaluation.scores import performance_retention, score_answer
from mmerge.pipeline.execution.executor import Executor
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.task import AnswerTask


@dataclass(frozen=True)
class Row:
    """One answer of one model, and its score (None without a right answer to compare with)."""

    model: str
    task: str
    id: str
    metric: str
    answer: str
    right: str
    score: float | None


@dataclass(frozen=True)
class TaskScore:
    """A model's mean score on one task, its standard error, and the ratio to the original's."""

    model: str
    task: str
    metric: str
    num_questions: int
    score: float
    standard_error: float
    performance_retention: float | None


def evaluate(
    models: Sequence[Model],
    questions: Sequence[Question],
    *,
    out: str,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> list[Row]:
    """Return every model's answers to all questions, scored.

    Answers are stored; after an interruption only those that are missing are computed.

    Args:
        models: all get equal prompts: the templates of the first composite that has any.
        questions: what is asked.
        out: folder or URI of the store for answers.
        settings: how it is asked.
        executor: where the models run; this process if None.
        progress: notified of every task.
        fresh: ask again, even where the store has an answer.

    Raises:
        RecipeError: a model does not read the media of a question.
        PromptError, ManifestError, StoreError: a file or a model cannot be read.
    """
    check_media(models, questions)
    template, media_templates = find_templates(models)
    prompts = [
        question.to_prompt(template=template, media_templates=media_templates)
        for question in questions
    ]
    store = open_store(out, create=True)
    tasks_by_model = {
        model.name: _make_tasks(model, prompts, settings=settings, fresh=fresh) for model in models
    }
    run_answer_tasks(
        [task for tasks in tasks_by_model.values() for task in tasks],
        store,
        executor=executor,
        progress=progress,
        fresh=fresh,
    )
    from mmerge.workers.tasks.answer import Answer, read_answers  # imports transformers

    rows = []
    for model in models:
        answers: list[object] = []
        for task in tasks_by_model[model.name]:
            answers += read_answers(store, task.key)
        for question, answer in zip(questions, answers, strict=True):
            assert isinstance(answer, Answer)
            rows.append(_make_row(model.name, question, answer.text))
    return rows


def _make_tasks(
    model: Model, prompts: Sequence[tuple[Part, ...]], *, settings: Settings, fresh: bool
) -> list[AnswerTask]:
    return [
        make_answer_task(
            model,
            prompts[start : start + QUESTIONS_PER_TASK],
            shard=f"{model.name}/{start // QUESTIONS_PER_TASK}",
            settings=settings,
            fresh=fresh,
        )
        for start in range(0, len(prompts), QUESTIONS_PER_TASK)
    ]


def _make_row(model_name: str, question: Question, answer: str) -> Row:
    return Row(
        model=model_name,
        task=question.task,
        id=question.id,
        metric=question.metric,
        answer=answer,
        right=question.answers[0] if question.answers else "",
        score=score_answer(question, answer) if question.answers else None,
    )


def check_original(original: str, model_names: Sequence[str]) -> None:
    """Raise RecipeError if no model has the name of the original."""
    if original not in model_names:
        raise RecipeError(
            f"--original: there is no model {original!r}; there are {', '.join(model_names)}"
        )


def summarise(rows: Sequence[Row], *, original: str | None = None) -> list[TaskScore]:
    """Return every model's score on every task; with `original`, the ratios to that model's scores.

    Raises:
        RecipeError: there is no model of that name.
    """
    if original is not None:
        check_original(original, list(dict.fromkeys(row.model for row in rows)))
    scores_by_task: dict[tuple[str, str], list[float]] = {}
    metrics: dict[str, str] = {}
    for row in rows:
        if row.score is not None:
            scores_by_task.setdefault((row.model, row.task), []).append(row.score)
            metrics.setdefault(row.task, row.metric)
    means = {key: sum(scores) / len(scores) for key, scores in scores_by_task.items()}
    task_scores = []
    for (model, task), scores in scores_by_task.items():
        mean, reference = means[(model, task)], means.get((original or "", task))
        variance = sum((score - mean) ** 2 for score in scores) / max(len(scores) - 1, 1)
        retention = None
        if reference is not None:
            retention = performance_retention({task: mean}, {task: reference})
        task_scores.append(
            TaskScore(
                model=model,
                task=task,
                metric=metrics[task],
                num_questions=len(scores),
                score=mean,
                standard_error=math.sqrt(variance / len(scores)),
                performance_retention=retention,
            )
        )
    return task_scores
