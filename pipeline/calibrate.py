"""Choose mask scales and density without labels: the experts' own answers say what a composite should answer.

A sweep builds the composite at every mask scale of a grid. Surveys, base and carried tensors are shared by all of these builds, so each costs
one merge of what is already surveyed. One build serves all experts: an expert's mask depends on its own scale alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.store import Store, is_local, open_store
from mmerge.pipeline.build import run
from mmerge.pipeline.evaluate import Model, Settings, make_answer_task, run_answers
from mmerge.pipeline.executor import Executor, SerialExecutor
from mmerge.pipeline.plan import make_plan
from mmerge.pipeline.progress import LogProgress, Progress
from mmerge.pipeline.questions import Question
from mmerge.pipeline.recipe import Recipe, parse_recipe
from mmerge.workers.methods import find_method
from mmerge.workers.prompt import Part
from mmerge.workers.task import AnswerTask

SCALES = {"mmer": (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.25, 1.5, 1.75, 2.0), "tall_masks": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)}
"""Mask scales to try, by method. Published are 0.6 to 0.9 for MMER, 0.2 to 0.6 for TALL masks; the grids reach beyond on both sides."""


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with an expert's own greedy answers, over that expert's prompts."""

    probability: float
    """exp of the mean log-probability per token of the expert's answers: 1 where the model is sure of all of them."""
    same_answers: float
    """Share of prompts to which the model greedily gives just the expert's answer."""


@dataclass(frozen=True)
class Point:
    """One place of the sweep."""

    density: float
    mask_scale: float
    expert: str
    rebuilt: Agreement
    expanded: Agreement

    @property
    def objective(self) -> float:
        """What the choice makes large: the mean probability of the rebuilt and of the expanded model."""
        return (self.rebuilt.probability + self.expanded.probability) / 2


@dataclass(frozen=True)
class Calibration:
    """The curve, and what was chosen from it."""

    points: tuple[Point, ...]
    density: float
    mask_scales: dict[str, float]
    chosen: tuple[Point, ...]
    """The chosen scales measured together, per expert."""
    is_shared: bool
    """Whether one scale for all experts agreed better than the best of each."""
    num_prompts: dict[str, int]


def calibrate(
    recipe: Recipe,
    questions: Sequence[Question],
    *,
    scales: Sequence[float] = (),
    densities: Sequence[float] = (),
    settings: Settings = Settings(),  # noqa: B008 - frozen
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Return the mask scale per expert, and the density, at which the composite agrees best with the experts' own answers.

    Args:
        recipe: of a method with mask scales (`mmer`, `tall_masks`); sweeps are built in its store.
        questions: prompts with media of one modality each; right answers, where there are any, are not looked at.
        scales: the grid of mask scales, SCALES of the method if empty. densities: those to try; the recipe's own if empty.
        settings: how prompts are asked. executor: where everything runs. progress: told of every task.

    Raises:
        RecipeError: the method has no mask scales, a modality has several experts, or an expert has no prompt.
    """
    return _Sweep(recipe, questions, settings, executor or SerialExecutor(), progress or LogProgress()).run(
        scales or SCALES[recipe.method], densities
    )


class _Sweep:
    def __init__(self, recipe: Recipe, questions: Sequence[Question], settings: Settings, executor: Executor, progress: Progress) -> None:
        method = find_method(recipe.method)
        if "mask_scale" not in method.expert_parameters_model.model_fields:
            raise RecipeError(f"method: {recipe.method!r} has no mask scales to calibrate; 'mmer' and 'tall_masks' have")
        self.recipe, self.settings, self.executor, self.progress = recipe, settings, executor, progress
        self.has_density = "density" in method.parameters_model.model_fields
        self.store: Store = open_store(recipe.output, create=True)
        self.questions = _assign(recipe, questions)
        self.prompts: dict[str, list[tuple[Part, ...]]] = {}
        self.targets: dict[str, list[tuple[int, ...]]] = {}

    def run(self, scales: Sequence[float], densities: Sequence[float]) -> Calibration:
        if densities and not self.has_density:
            raise RecipeError(f"--density: method {self.recipe.method!r} has none")
        own = float(getattr(self.recipe.parameters, "density", 1.0))
        self._ask_experts()
        wanted = sorted({(density, scale) for density in densities or (own,) for scale in scales})
        models = {place: self._build(place[0], dict.fromkeys(self.prompts, place[1])) for place in wanted}
        points = self._measure(
            {(density, scale): (model, density, dict.fromkeys(self.prompts, scale)) for (density, scale), model in models.items()}
        )
        density, best, shared = _choose(points)
        mixed = self._measure({(density, -1.0): (self._build(density, best), density, best)}) if best != shared else ()
        at_shared = [point for point in points if point.density == density and point.mask_scale == shared[point.expert]]
        is_shared = not mixed or _mean(mixed) < _mean(at_shared)
        counts = {name: len(found) for name, found in self.prompts.items()}
        chosen = tuple(at_shared if is_shared else mixed)
        return Calibration(tuple(points), density, shared if is_shared else best, chosen, is_shared and best != shared, counts)

    def _ask_experts(self) -> None:
        """Let every expert, as it was tuned, answer its own prompts."""
        tasks: dict[str, AnswerTask] = {}
        template, media = self.recipe.template, {e.modality: e.template for e in self.recipe.experts if e.template}
        for expert in self.recipe.experts:
            prompts = [question.to_prompt(template=template, media_templates=media) for question in self.questions[expert.name]]
            self.prompts[expert.name] = prompts
            tasks[expert.name] = make_answer_task(
                self._original(expert.name), prompts, shard=f"{expert.name} itself", settings=self.settings
            )
        run_answers(list(tasks.values()), self.store, executor=self.executor, progress=self.progress)
        from mmerge.workers.answering import Answer, read_answers

        for name, task in tasks.items():
            answers = [answer for answer in read_answers(self.store, task.key) if isinstance(answer, Answer)]
            self.targets[name] = [answer.tokens for answer in answers]

    def _original(self, name: str) -> Model:
        """Return one expert as it is: a linear merge of it alone."""
        recipe = self.recipe
        (expert,) = (each for each in recipe.experts if each.name == name)
        keys = {"path": expert.uri, "modality": expert.modality, "placeholder": expert.placeholder, "template": expert.template}
        raw: dict[str, Any] = {
            "name": f"calibrate-expert-{digest_json([expert.uri, recipe.base])[:12]}", "method": "linear", "base": recipe.base, "output": recipe.output,
            "dtype": recipe.dtype, "template": recipe.template, "carry": list(recipe.carry),
            "experts": {name: {key: value for key, value in keys.items() if value is not None}},
        }  # fmt: skip
        made = parse_recipe({key: value for key, value in raw.items() if value is not None}, folder=Path.cwd())
        return Model.open(name, run(make_plan(made), executor=self.executor, progress=self.progress).uri, expert=name)

    def _build(self, density: float, scales: Mapping[str, float]) -> Model:
        """Return the composite with these numbers, under a name that says what it is for."""
        experts = tuple(
            replace(expert, parameters=expert.parameters.model_copy(update={"mask_scale": scales[expert.name]}))
            for expert in self.recipe.experts
        )
        parameters = self.recipe.parameters.model_copy(update={"density": density} if self.has_density else {})
        made = replace(self.recipe, name=f"{self.recipe.name}-calibrate", experts=experts, parameters=parameters, schedules={})
        report = run(make_plan(made), executor=self.executor, progress=self.progress)
        return Model.open(report.build[:12], f"{self.store.uri}#{report.build}")

    def _measure(self, places: Mapping[tuple[float, float], tuple[Model, float, Mapping[str, float]]]) -> list[Point]:
        tasks: dict[tuple[tuple[float, float], str, bool], AnswerTask] = {}
        for place, (model, _, _) in places.items():
            for name, prompts in self.prompts.items():
                for is_rebuilt in (True, False):
                    asked = replace(model, expert=name if is_rebuilt else None)
                    shard = f"{name} {'rebuilt' if is_rebuilt else 'expanded'} at {place[1]:g}"
                    tasks[(place, name, is_rebuilt)] = make_answer_task(
                        asked, prompts, shard=shard, settings=self.settings, targets=self.targets[name]
                    )
        ordered = sorted(tasks.items(), key=lambda item: (item[0][0], (item[0][2] and item[0][1]) or ""))
        run_answers([task for _, task in ordered], self.store, executor=self.executor, progress=self.progress)
        return [
            Point(density, scales[name], name, self._agreement(tasks[(place, name, True)]), self._agreement(tasks[(place, name, False)]))
            for place, (_, density, scales) in places.items()
            for name in self.prompts
        ]

    def _agreement(self, task: AnswerTask) -> Agreement:
        from mmerge.workers.answering import Likelihood, read_answers

        found = [each for each in read_answers(self.store, task.key) if isinstance(each, Likelihood)]
        return Agreement(
            math.exp(sum(each.log_probability for each in found) / len(found)), sum(each.is_greedy for each in found) / len(found)
        )


def _assign(recipe: Recipe, questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Return each expert's questions: those whose media are all of its modality."""
    owners: dict[str, list[str]] = {}
    for expert in recipe.experts:
        owners.setdefault(expert.modality, []).append(expert.name)
    found: dict[str, list[Question]] = {expert.name: [] for expert in recipe.experts}
    for question in questions:
        kinds = {part.kind for part in (*question.parts, *question.media) if part.kind != "text"}
        if len(kinds) == 1:
            (kind,) = kinds
            names = [kind] if kind in found else owners.get(kind, [])
            if len(names) > 1:
                raise RecipeError(
                    f"question {question.id!r}: {len(names)} experts have modality {kind!r}; name the expert instead: {', '.join(names)}"
                )
            for name in names:
                found[name].append(question)
    lacking = [name for name, own in found.items() if not own]
    if lacking:
        raise RecipeError(
            f"no prompt has media of expert {lacking[0]!r} alone. Give each expert some prompts of its own modality; no labels are needed"
        )
    return found


def _choose(points: Sequence[Point]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return density, the best scale of each expert, and the best scale that all share. Among equals the smaller number wins."""
    experts = list(dict.fromkeys(point.expert for point in points))

    def best_at(density: float) -> dict[str, Point]:
        return {
            name: max((p for p in points if p.density == density and p.expert == name), key=lambda p: (p.objective, -p.mask_scale))
            for name in experts
        }

    densities = sorted({point.density for point in points})
    density = max(densities, key=lambda each: (_mean(best_at(each).values()), -each))
    scales = sorted({point.mask_scale for point in points})
    shared = max(scales, key=lambda s: (_mean([p for p in points if p.density == density and p.mask_scale == s]), -s))
    return density, {name: point.mask_scale for name, point in best_at(density).items()}, dict.fromkeys(experts, shared)


def _mean(points: Iterable[Point]) -> float:
    found = [point.objective for point in points]
    return sum(found) / len(found)


def write_recipe(source: Path, target: Path, found: Calibration, *, with_density: bool) -> None:
    """Write the recipe in `source` with the chosen numbers; its relative paths are made to fit the new folder. Comments are not kept.

    Raises:
        RecipeError: the source is no recipe of this project, or the target cannot be written.
    """
    raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("experts"), dict):
        raise RecipeError(f"{source}: is no recipe of this project; calibrated numbers: {found.mask_scales}, density {found.density}")
    move = _mover(source.absolute().parent, target.absolute().parent)
    for key in ("base", "output"):
        if isinstance(raw.get(key), str):
            raw[key] = move(raw[key])
    for name, expert in raw["experts"].items():
        expert["path"] = move(expert["path"])
        expert["mask_scale"] = found.mask_scales[name]
    if with_density:
        raw["density"] = found.density
    text = "# Mask scales chosen by 'mmerge calibrate', from the experts' own answers.\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--to: {target}: cannot be written ({error.strerror or error})") from error


def _mover(source: Path, target: Path) -> Callable[[str], str]:
    def move(uri: str) -> str:
        if not is_local(uri) or Path(uri).expanduser().is_absolute() or uri.startswith("file://"):
            return uri
        return os.path.relpath(source / uri, target)

    return move
