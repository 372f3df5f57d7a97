"""What a composite should answer, without labels: prompts, and the experts' own answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.evaluate import Model, Settings, make_answer_task, run_answers
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.execution.executor import Executor
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.recipe import Recipe, parse_recipe
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.task import AnswerTask

Prompt = tuple[Part, ...]


@dataclass(frozen=True)
class Targets:
    """Prompts, the answer wanted to each, and the experts whose media each has."""

    prompts: tuple[Prompt, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()
    """Token ids, the end token included where it came."""
    experts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Asking:
    """How and where models are asked."""

    store: Store
    settings: Settings
    executor: Executor
    progress: Progress

    def run(self, tasks: Sequence[AnswerTask]) -> None:
        """Run the tasks whose results are not there yet."""
        run_answers(tasks, self.store, executor=self.executor, progress=self.progress)


def ask_experts(
    recipe: Recipe, questions: Sequence[Question], asking: Asking
) -> tuple[dict[str, Targets], Targets]:
    """Let the experts, as they were tuned, answer: return the targets of each expert's own prompts,
    and of prompts with several modalities.

    An expert answers a prompt greedily. Of a prompt with several modalities each expert is shown
    its own medium alone, and the answer that an expert is surest of (the largest mean
    log-probability per token; the first of equals) is the target.

    Raises:
        RecipeError: a prompt has no medium, or one of no expert; a modality has several experts; or
            an expert has no prompt of its own.
    """
    own, mixed = assign(recipe, questions)
    template, media = (
        recipe.template,
        {e.modality: e.template for e in recipe.experts if e.template},
    )

    def to_prompt(question: Question) -> Prompt:
        return question.to_prompt(template=template, media_templates=media)

    models = {expert.name: _open_original(recipe, expert.name, asking) for expert in recipe.experts}
    single = {name: tuple(to_prompt(question) for question in found) for name, found in own.items()}
    whole = [(to_prompt(question), names) for question, names in mixed]
    shown = {
        name: {
            index: _show(prompt, {name, _modality_of(recipe, name)}) for index, (prompt, names) in enumerate(whole) if name in names
        }
        for name in models
    }  # fmt: skip
    answers = _answer(
        models, {name: [*single[name], *shown[name].values()] for name in models}, asking
    )
    alone = {
        name: dict(zip(shown[name], answers[name][len(single[name]) :], strict=True))
        for name in models
    }
    sureness = _score(models, shown, alone, asking)
    targets = []
    for index, (_, names) in enumerate(whole):
        surest = max(names, key=lambda name: sureness[name][index])
        targets.append(alone[surest][index])
    by_expert = {
        name: Targets(found, tuple(answers[name][: len(found)]), ((name,),) * len(found)) for name, found in single.items()
    }  # fmt: skip
    return by_expert, Targets(
        tuple(prompt for prompt, _ in whole), tuple(targets), tuple(names for _, names in whole)
    )


def assign(
    recipe: Recipe, questions: Sequence[Question]
) -> tuple[dict[str, list[Question]], list[tuple[Question, tuple[str, ...]]]]:
    """Return each expert's own questions, and those with media of several experts beside their
    names, in recipe order.

    Raises:
        RecipeError: as `ask_experts`.
    """
    own: dict[str, list[Question]] = {expert.name: [] for expert in recipe.experts}
    mixed: list[tuple[Question, tuple[str, ...]]] = []
    for question in questions:
        kinds = {part.kind for part in (*question.parts, *question.media) if part.kind != "text"}
        owners = {_owner(kind, recipe, question) for kind in kinds}
        if not owners:
            raise RecipeError(
                f"question {question.id!r}: has no medium, so no expert can say what is right."
                " Leave it out"
            )
        if len(owners) == 1:
            own[owners.pop()].append(question)
        else:
            mixed.append((question, tuple(name for name in own if name in owners)))
    lacking = [name for name, found in own.items() if not found]
    if lacking:
        raise RecipeError(
            f"no prompt has media of expert {lacking[0]!r} alone. Give each expert some prompts of"
            " its own modality; no labels are needed"
        )
    return own, mixed


def _owner(kind: str, recipe: Recipe, question: Question) -> str:
    fitting = [e.name for e in recipe.experts if e.name == kind] or [
        e.name for e in recipe.experts if e.modality == kind
    ]
    if len(fitting) > 1:
        raise RecipeError(
            f"question {question.id!r}: {len(fitting)} experts have modality {kind!r}; name the"
            f" expert instead: {', '.join(fitting)}"
        )
    if not fitting:
        known = ", ".join(dict.fromkeys(e.modality for e in recipe.experts))
        raise RecipeError(
            f"question {question.id!r}: no expert of the recipe reads {kind!r}; they read {known}."
            " Leave it out"
        )
    return fitting[0]


def _modality_of(recipe: Recipe, name: str) -> str:
    (modality,) = (expert.modality for expert in recipe.experts if expert.name == name)
    return modality


def _show(prompt: Prompt, kinds: set[str]) -> Prompt:
    return tuple(part for part in prompt if part.kind == "text" or part.kind in kinds)


def _answer(
    models: Mapping[str, Model], prompts: Mapping[str, Sequence[Prompt]], asking: Asking
) -> dict[str, list[tuple[int, ...]]]:
    tasks = {
        name: make_answer_task(
            model, prompts[name], shard=f"{name} itself", settings=asking.settings
        )
        for name, model in models.items()
    }
    asking.run(list(tasks.values()))
    from mmerge.workers.tasks.answer import Answer, read_answers

    return {
        name: [
            each.tokens for each in read_answers(asking.store, task.key) if isinstance(each, Answer)
        ]
        for name, task in tasks.items()
    }


def _score(
    models: Mapping[str, Model],
    prompts: Mapping[str, Mapping[int, Prompt]],
    answers: Mapping[str, Mapping[int, tuple[int, ...]]],
    asking: Asking,
) -> dict[str, dict[int, float]]:
    tasks = {
        name: make_answer_task(
            models[name],
            list(prompts[name].values()),
            shard=f"{name} alone",
            settings=asking.settings,
            targets=list(answers[name].values()),
        )
        for name in models
        if prompts[name]
    }
    asking.run(list(tasks.values()))
    from mmerge.workers.tasks.answer import Likelihood, read_answers

    found = {
        name: [
            each.log_probability
            for each in read_answers(asking.store, task.key)
            if isinstance(each, Likelihood)
        ]
        for name, task in tasks.items()
    }
    return {name: dict(zip(prompts[name], values, strict=True)) for name, values in found.items()}


def _open_original(recipe: Recipe, name: str, asking: Asking) -> Model:
    """Return one expert as it is: a linear merge of it alone."""
    (expert,) = (each for each in recipe.experts if each.name == name)
    keys = {
        "path": expert.uri,
        "modality": expert.modality,
        "placeholder": expert.placeholder,
        "template": expert.template,
    }
    raw: dict[str, Any] = {
        "name": f"calibrate-expert-{digest_json([expert.uri, recipe.base])[:12]}", "method": "linear", "base": recipe.base, "output": recipe.output,
        "dtype": recipe.dtype, "template": recipe.template, "carry": list(recipe.carry),
        "experts": {name: {key: value for key, value in keys.items() if value is not None}},
    }  # fmt: skip
    made = parse_recipe(
        {key: value for key, value in raw.items() if value is not None}, folder=Path.cwd()
    )
    return Model.open(
        name,
        run(make_plan(made), executor=asking.executor, progress=asking.progress).uri,
        expert=name,
    )
