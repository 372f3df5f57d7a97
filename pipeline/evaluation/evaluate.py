"""Ask models the same questions, score the answers, and compare with an original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError, TaskErrors
from mmerge.manifests.format.manifest import Manifest, read_manifest
from mmerge.manifests.format.references import open_build
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import is_local, open_store, to_local_path
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.evaluation.scores import performance_retention, score_answer
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.recipe import parse_recipe
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.task import AnswerTask, TaskResult

ANSWERS_VERSION = 1
"""Raised when the same prompts may get other answers: no older answers are then reused."""
PROCESS_BYTES = 500_000_000
CHUNK = 64
"""Questions per task: what is lost when a run is killed, and the unit that Ray spreads."""


@dataclass(frozen=True)
class Model:
    """A model to ask: a build in a store, and the expert to rebuild from it, or None to route by
    modality.
    """

    name: str
    uri: str
    expert: str | None = None
    build: str = ""
    manifest: Manifest | None = None

    @classmethod
    def open(cls, name: str, uri: str, *, expert: str | None = None) -> Model:
        """Return the model at a composite's URI. Raises StoreError, ManifestError."""
        store, build = open_build(uri)
        manifest = read_manifest(store, build)
        if expert is not None:
            manifest.to_expert(expert)
        return cls(name, f"{store.uri}#{build}", expert, build, manifest)

    @property
    def num_bytes(self) -> int:
        """Bytes of the build's objects."""
        return sum(entry.num_bytes for entry in self.manifest.entries) if self.manifest else 0


def open_checkpoint(
    name: str,
    folder: str,
    *,
    base: str | None,
    modality: str | None,
    store_uri: str,
    executor: Executor,
    progress: Progress,
) -> Model:
    """Return an ordinary checkpoint as a model: a build of it alone, in the evaluation's own store,
    equal to it bit for bit.

    Args:
        name: what the model is called.
        folder: the checkpoint, Hugging Face layout. URIs as in recipes.
        base: the language model that it was tuned from, which says which of its tensors are the
            language model's; a checkpoint of text alone needs none.
        modality: what its encoder reads; of a checkpoint of text alone None.
        store_uri, executor, progress: where and how the build is made.

    Raises:
        RecipeError: a multimodal checkpoint without base. CheckpointError: it cannot be read.
    """
    if modality and not base:
        raise RecipeError(
            f"{name}: {folder}: give its base LLM with --base, so that encoder and language model"
            " can be told apart"
        )
    raw: dict[str, Any] = {
        "name": f"model-{digest_json([folder, base, modality])[:12]}",
        "method": "linear",
        "output": store_uri,
    }
    raw |= {"experts": {modality or "text": {"path": folder, "modality": modality or "text"}}} | (
        {"base": base} if base else {}
    )
    report = run(
        make_plan(parse_recipe(raw, folder=Path.cwd())), executor=executor, progress=progress
    )
    found = Model.open(name, report.uri, expert=modality)
    return Model(name, found.uri, found.expert, found.build, found.manifest)


@dataclass(frozen=True)
class Settings:
    """How questions are asked."""

    max_new_tokens: int = 64
    batch_size: int = 16
    encoders: tuple[str, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One answer: which model gave it to which question, and its score (None where no right answer
    is known).
    """

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
    settings: Settings = Settings(),
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> list[Row]:
    """Return every model's answers to all questions, scored; a run that was killed continues where
    it was.

    Args:
        models: asked with the very same prompts: the templates of the first composite that has any
            are used for all.
        questions: what is asked.
        out: folder or URI of a store for answers.
        settings: how it is asked. executor: where. progress: told of every task.
        fresh: ask again, whatever answers there are.

    Raises:
        RecipeError: a model reads no such media as a question has.
        PromptError, ManifestError, StoreError: a medium cannot be read, or a model cannot.
    """
    check_media(models, questions)
    template, media_templates = find_templates(models)
    prompts = [
        question.to_prompt(template=template, media_templates=media_templates)
        for question in questions
    ]
    store = open_store(out, create=True)
    tasks = {
        model.name: [
            make_answer_task(
                model,
                prompts[start : start + CHUNK],
                shard=f"{model.name}/{start // CHUNK}",
                settings=settings,
                fresh=fresh,
            )
            for start in range(0, len(prompts), CHUNK)
        ]
        for model in models
    }
    run_answers(
        [task for found in tasks.values() for task in found],
        store,
        executor=executor,
        progress=progress,
        fresh=fresh,
    )
    from mmerge.workers.tasks.answer import Answer, read_answers

    rows = []
    for model in models:
        answers = [answer for task in tasks[model.name] for answer in read_answers(store, task.key)]
        for question, answer in zip(questions, answers, strict=True):
            assert isinstance(answer, Answer)
            score = score_answer(question, answer.text) if question.answers else None
            right = question.answers[0] if question.answers else ""
            rows.append(
                Row(
                    model.name,
                    question.task,
                    question.id,
                    question.metric,
                    answer.text,
                    right,
                    score,
                )
            )
    return rows


def check_media(models: Sequence[Model], questions: Sequence[Question]) -> None:
    """Raise RecipeError for the first question with media that one of the models does not read,
    before any model is loaded.
    """
    for model in models:
        experts = model.manifest.experts if model.manifest else ()
        loaded = [record for record in experts if model.expert in (None, record.name)]
        known = {kind for record in loaded for kind in (record.name, record.modality)} | {"text"}
        for question in questions:
            strange = sorted({part.kind for part in (*question.parts, *question.media)} - known)
            if strange and model.manifest:
                readable = (
                    ", ".join(dict.fromkeys(record.modality for record in loaded)) or "text alone"
                )
                raise RecipeError(
                    f"question {question.id!r} of task {question.task!r}: model {model.name!r} does"
                    f" not read {strange[0]!r}; it reads {readable}"
                )


def find_templates(models: Sequence[Model]) -> tuple[str | None, dict[str, str]]:
    """Return the prompt template and the templates of media, by modality, that the models' recipes
    gave; the first model's win.
    """
    template: str | None = None
    media: dict[str, str] = {}
    for model in models:
        if model.manifest is not None:
            template = model.manifest.template if template is None else template
            media = {
                record.modality: record.template
                for record in model.manifest.experts
                if record.template
            } | media
    return template, media


def make_answer_task(
    model: Model,
    prompts: Sequence[tuple[Part, ...]],
    *,
    shard: str,
    settings: Settings,
    targets: Sequence[tuple[int, ...]] | None = None,
    fresh: bool = False,
) -> AnswerTask:
    """Return the task of asking a model some prompts. Its key follows from the build, the prompts
    and the media's files.
    """
    described = [[[part.kind, _describe(part)] for part in parts] for parts in prompts]
    asked = [
        settings.max_new_tokens,
        list(settings.encoders),
        settings.device,
        None if targets is None else [list(t) for t in targets],
    ]
    key = digest_json([ANSWERS_VERSION, model.build, model.expert, described, asked])
    return AnswerTask(
        key=key, shard=shard, model=model.uri, expert=model.expert, prompts=tuple(prompts),
        targets=None if targets is None else tuple(targets), max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        encoders=settings.encoders, device=settings.device, num_bytes=model.num_bytes, peak_bytes=2 * model.num_bytes + PROCESS_BYTES,
        fresh=fresh,
    )  # fmt: skip


def _describe(part: Part) -> Any:
    """Return what a part's answer depends on: its text, or path, size and time of change of its
    file.
    """
    if part.kind == "text" or not isinstance(part.value, str):
        return part.value
    try:
        found = Path(part.value).stat()
    except OSError:
        return part.value
    return [part.value, found.st_size, found.st_mtime_ns]


def run_answers(
    tasks: Sequence[AnswerTask],
    store: Store,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> None:
    """Run the tasks whose answers are not in the store yet. Raises the failure, or all of them in
    one.
    """
    executor, progress = executor or SerialExecutor(), progress or LogProgress()
    unique = {task.key: task for task in tasks}
    waiting = [
        task for task in unique.values() if fresh or not store.exists(f"answers/{task.key}.json")
    ]
    total = sum(task.num_bytes for task in waiting)
    progress.begin(
        "answer", num_bytes=total, num_tasks=len(waiting), num_reused=len(unique) - len(waiting)
    )
    failures: list[Exception] = []
    with closing(executor.run(waiting, store.uri)) as outcomes:
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


def summarise(rows: Sequence[Row], *, original: str | None = None) -> list[TaskScore]:
    """Return every model's score on every task; with `original` (a model's name), the ratios to
    that model's.

    Raises:
        RecipeError: there is no model of that name.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.score is not None:
            found.setdefault((row.model, row.task), []).append(row)
    means = {
        key: sum(row.score or 0.0 for row in group) / len(group) for key, group in found.items()
    }
    names = list(dict.fromkeys(row.model for row in rows))
    if original is not None and original not in names:
        raise RecipeError(
            f"--original: there is no model {original!r}; there are {', '.join(names)}"
        )
    scores = []
    for (model, task), group in found.items():
        mean, reference = means[(model, task)], means.get((original or "", task))
        variance = sum(((row.score or 0.0) - mean) ** 2 for row in group) / max(len(group) - 1, 1)
        kept = (
            performance_retention({task: mean}, {task: reference})
            if reference is not None
            else None
        )
        scores.append(
            TaskScore(
                model,
                task,
                group[0].metric,
                len(group),
                mean,
                math.sqrt(variance / len(group)),
                kept,
            )
        )
    return scores


def is_checkpoint(uri: str) -> bool:
    """Return whether a URI is a folder with a config.json, not a store."""
    if "#" in uri:
        return False
    return (
        (to_local_path(uri) / "config.json").is_file() if is_local(uri) else uri.startswith("hf://")
    )
