"""Reference answers without labels: the experts' own answers to prompts of their modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.answer_tasks import Settings, make_answer_task, run_answer_tasks
from mmerge.pipeline.evaluation.models import Model
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.execution.executor import Executor
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.pipeline.recipes.recipe import Expert, Recipe
from mmerge.workers.modalities.prompt import QUESTION, Part
from mmerge.workers.task import AnswerTask

Prompt = tuple[Part, ...]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """Prompts, the reference answer to each, and the experts whose media it contains."""

    prompts: tuple[Prompt, ...] = ()
    answers: tuple[Tokens, ...] = ()
    """Token ids, including the end token if the answer has one."""
    experts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Asking:
    """How and where models are asked."""

    store: Store
    settings: Settings
    executor: Executor
    progress: Progress

    def run(self, tasks: Sequence[AnswerTask]) -> None:
        """Run the tasks whose results are not stored yet."""
        run_answer_tasks(tasks, self.store, executor=self.executor, progress=self.progress)


@dataclass(frozen=True)
class MixedPrompt:
    """A prompt with media of several experts, whose names are in recipe order."""

    prompt: Prompt
    experts: tuple[str, ...]


def ask_experts(
    recipe: Recipe, questions: Sequence[Question], asking: Asking
) -> tuple[dict[str, Targets], Targets]:
    """Return the targets of every expert's own prompts, and those of prompts with several experts.

    The fine-tuned experts answer greedily. Of a prompt with several modalities every expert sees
    its own media alone; the target is the answer with the largest mean log-probability per token
    under its own expert (the first of equals).

    Raises:
        RecipeError: a prompt has no media, or media of no expert; a modality has several experts;
            or an expert has no prompt of its own.
    """
    own_questions, mixed_questions = assign(recipe, questions)
    media_templates = {
        expert.modality: expert.template for expert in recipe.experts if expert.template
    }

    def to_prompt(question: Question) -> Prompt:
        return question.to_prompt(template=recipe.template, media_templates=media_templates)

    models = {expert.name: _open_original(recipe, expert, asking) for expert in recipe.experts}
    own_prompts = {
        name: [to_prompt(question) for question in expert_questions]
        for name, expert_questions in own_questions.items()
    }
    mixed_prompts = [MixedPrompt(to_prompt(question), names) for question, names in mixed_questions]
    seen_prompts = {expert.name: _select_media(mixed_prompts, expert) for expert in recipe.experts}
    answers = _generate(
        models,
        {name: [*own_prompts[name], *seen_prompts[name].values()] for name in models},
        asking,
    )
    own_targets = {}
    mixed_answers: dict[str, dict[int, Tokens]] = {}
    for name, prompts in own_prompts.items():
        own_answers = tuple(answers[name][: len(prompts)])
        own_targets[name] = Targets(tuple(prompts), own_answers, ((name,),) * len(prompts))
        mixed_answers[name] = dict(
            zip(seen_prompts[name], answers[name][len(prompts) :], strict=True)
        )
    log_probabilities = _score(models, seen_prompts, mixed_answers, asking)
    chosen_answers = []
    for index, mixed_prompt in enumerate(mixed_prompts):
        surest = mixed_prompt.experts[0]
        for name in mixed_prompt.experts[1:]:
            if log_probabilities[name][index] > log_probabilities[surest][index]:
                surest = name
        chosen_answers.append(mixed_answers[surest][index])
    mixed_targets = Targets(
        tuple(mixed_prompt.prompt for mixed_prompt in mixed_prompts),
        tuple(chosen_answers),
        tuple(mixed_prompt.experts for mixed_prompt in mixed_prompts),
    )
    return own_targets, mixed_targets


def assign(
    recipe: Recipe, questions: Sequence[Question]
) -> tuple[dict[str, list[Question]], list[tuple[Question, tuple[str, ...]]]]:
    """Return every expert's own questions, and questions of several experts with their names.

    Names are in recipe order.

    Raises:
        RecipeError: as `ask_experts`.
    """
    own_questions: dict[str, list[Question]] = {expert.name: [] for expert in recipe.experts}
    mixed: list[tuple[Question, tuple[str, ...]]] = []
    for question in questions:
        kinds = {part.kind for part in (*question.parts, *question.media) if part.kind != "text"}
        owners = {_find_owner(kind, recipe, question) for kind in kinds}
        if not owners:
            raise RecipeError(
                f"question {question.id!r}: has no media, so no expert can give the reference"
                " answer. Leave it out"
            )
        if len(owners) == 1:
            own_questions[owners.pop()].append(question)
        else:
            mixed.append((question, tuple(name for name in own_questions if name in owners)))
    experts_without_prompts = [name for name, assigned in own_questions.items() if not assigned]
    if experts_without_prompts:
        raise RecipeError(
            f"no prompt has media of expert {experts_without_prompts[0]!r} alone. Give every expert"
            " some prompts of its own modality; no labels are needed"
        )
    return own_questions, mixed


def _find_owner(kind: str, recipe: Recipe, question: Question) -> str:
    """Return the expert that media of this kind belong to: by its name, else by its modality."""
    names = [expert.name for expert in recipe.experts if expert.name == kind]
    if not names:
        names = [expert.name for expert in recipe.experts if expert.modality == kind]
    if len(names) > 1:
        raise RecipeError(
            f"question {question.id!r}: {len(names)} experts have modality {kind!r}. Name one"
            f" instead: {', '.join(names)}"
        )
    if not names:
        modalities = ", ".join(dict.fromkeys(expert.modality for expert in recipe.experts))
        raise RecipeError(
            f"question {question.id!r}: no expert of the recipe reads {kind!r}; they read"
            f" {modalities}. Leave it out"
        )
    return names[0]


def _select_media(mixed_prompts: Sequence[MixedPrompt], expert: Expert) -> dict[int, Prompt]:
    """Return, by index, the mixed prompts of an expert without the media of the others."""
    kinds = ("text", QUESTION, expert.name, expert.modality)
    return {
        index: tuple(part for part in mixed_prompt.prompt if part.kind in kinds)
        for index, mixed_prompt in enumerate(mixed_prompts)
        if expert.name in mixed_prompt.experts
    }


def _generate(
    models: Mapping[str, Model], prompts: Mapping[str, Sequence[Prompt]], asking: Asking
) -> dict[str, list[Tokens]]:
    """Return the greedy answers of every expert to its prompts."""
    tasks = {
        name: make_answer_task(
            model, prompts[name], shard=f"{name} itself", settings=asking.settings
        )
        for name, model in models.items()
    }
    asking.run(list(tasks.values()))
    from mmerge.workers.tasks.answer import Answer, read_answers  # imports transformers

    tokens: dict[str, list[Tokens]] = {}
    for name, task in tasks.items():
        answers = read_answers(asking.store, task.key)
        tokens[name] = [answer.tokens for answer in answers if isinstance(answer, Answer)]
    return tokens


def _score(
    models: Mapping[str, Model],
    prompts: Mapping[str, Mapping[int, Prompt]],
    answers: Mapping[str, Mapping[int, Tokens]],
    asking: Asking,
) -> dict[str, dict[int, float]]:
    """Return the mean log-probability per token of every expert's answers, by prompt index."""
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
    from mmerge.workers.tasks.answer import Likelihood, read_answers  # imports transformers

    log_probabilities: dict[str, dict[int, float]] = {}
    for name, task in tasks.items():
        values = [
            result.log_probability
            for result in read_answers(asking.store, task.key)
            if isinstance(result, Likelihood)
        ]
        log_probabilities[name] = dict(zip(prompts[name], values, strict=True))
    return log_probabilities


def _open_original(recipe: Recipe, expert: Expert, asking: Asking) -> Model:
    """Return one expert as it was fine-tuned: a linear merge of it alone."""
    expert_keys = {
        "path": expert.uri,
        "modality": expert.modality,
        "placeholder": expert.placeholder,
        "template": expert.template,
    }
    recipe_keys: dict[str, Any] = {
        "name": f"calibrate-expert-{digest_json([expert.uri, recipe.base])[:12]}",
        "method": "linear",
        "base": recipe.base,
        "output": recipe.output,
        "dtype": recipe.dtype,
        "template": recipe.template,
        "carry": list(recipe.carry),
        "experts": {expert.name: _drop_none(expert_keys)},
    }
    plan = make_plan(parse_recipe(_drop_none(recipe_keys), folder=Path.cwd()))
    report = run(plan, executor=asking.executor, progress=asking.progress)
    return Model.open(expert.name, report.uri, expert=expert.name)


def _drop_none(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}
