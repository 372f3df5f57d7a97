"""Choose mask scales and density without labels, by agreement with the experts' own answers.

A sweep builds the composite at every mask scale of a grid. All builds share the scans, the base and
the copied tensors, so each costs one merge. One build serves all experts: an expert's mask depends
on its own scale alone. The mean mask of text tokens depends on all scales; the chosen ones are
therefore measured together at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.answer_tasks import Settings, make_answer_task
from mmerge.pipeline.evaluation.models import Model
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.evaluation.targets import Asking, Targets, ask_experts
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.workers.methods import find_method
from mmerge.workers.task import AnswerTask

if TYPE_CHECKING:
    from mmerge.workers.tasks.answer import Likelihood

SCALES = {
    "mmer": (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.25, 1.5, 1.75, 2.0),
    "tall_masks": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5),
}
"""Mask scales to try, by method. Published are 0.6 to 0.9 for MMER and 0.2 to 0.6 for TALL masks;
the grids extend beyond them on both sides.
"""


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with an expert's own greedy answers, over that expert's prompts."""

    probability: float
    """exp of the mean log-probability per token of the expert's answers; 1 at most."""
    same_answers: float
    """Share of prompts whose greedy answer is exactly the expert's."""


@dataclass(frozen=True)
class Point:
    """Agreement with one expert at one place of the sweep."""

    density: float
    mask_scale: float
    expert: str
    rebuilt: Agreement
    """Retention: the expert reconstructed alone."""
    expanded: Agreement
    """Expansion: the composite, on prompts of the expert's own modality."""
    mixed: Agreement | None = None
    """Expansion on prompts of several modalities, the expert's among them; None without any."""

    @property
    def objective(self) -> float:
        """What the calibration maximises, see `weigh`."""
        return weigh(
            self.rebuilt.probability,
            self.expanded.probability,
            None if self.mixed is None else self.mixed.probability,
        )


def weigh(rebuilt: float, expanded: float, mixed: float | None) -> float:
    """Return the mean of retention and expansion.

    Expansion is the mean over own and mixed prompts, if there are mixed ones.
    """
    expansion = expanded if mixed is None else (expanded + mixed) / 2
    return (rebuilt + expansion) / 2


@dataclass(frozen=True)
class Calibration:
    """The agreement curve, and the values chosen from it."""

    points: tuple[Point, ...]
    density: float
    mask_scales: dict[str, float]
    chosen: tuple[Point, ...]
    """The chosen scales measured together, one point per expert."""
    is_shared: bool
    """Whether one scale for all experts agreed better than the best scale of each."""
    num_prompts: dict[str, int]
    """Prompts of every expert's own modality alone."""
    num_mixed: int = 0
    """Prompts of several modalities."""


@dataclass(frozen=True)
class Place:
    """One composite to build and measure: a density, and a mask scale per expert."""

    density: float
    scales: Mapping[str, float]


@dataclass(frozen=True)
class PlaceTasks:
    """The answer tasks of one composite."""

    rebuilt: dict[str, AnswerTask]
    """By expert: its prompts, asked to the reconstructed expert."""
    expanded: dict[str, AnswerTask]
    """By expert: its prompts, asked to the composite."""
    mixed: AnswerTask | None
    """Prompts of several modalities, asked to the composite."""

    @property
    def all(self) -> list[AnswerTask]:
        """Every task."""
        tasks = [*self.expanded.values(), *self.rebuilt.values()]
        return tasks if self.mixed is None else [*tasks, self.mixed]


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
    """Return the mask scales and density at which the composite agrees best with the experts.

    Args:
        recipe: of a method with mask scales (`mmer`, `tall_masks`); the composites of the sweep are
            built in its store.
        questions: some for every expert with media of its modality alone, and optionally some of
            several modalities; right answers are ignored.
        scales: grid of mask scales; the method's SCALES if empty.
        densities: grid of densities; the recipe's own if empty.
        settings: how prompts are asked.
        executor: where everything runs; this process if None.
        progress: notified of every task.

    Raises:
        RecipeError: the method has no mask scales, a modality has several experts, an expert has no
            prompt, or a prompt has no expert.
    """
    method = find_method(recipe.method)
    if "mask_scale" not in method.expert_parameters_model.model_fields:
        raise RecipeError(
            f"method: {recipe.method!r} has no mask scales to calibrate. Use"
            f" {' or '.join(repr(name) for name in SCALES)}"
        )
    if densities and "density" not in method.parameters_model.model_fields:
        raise RecipeError(
            f"--densities: method {recipe.method!r} has no density. Leave the option out"
        )
    for scale in scales:
        _check_value("--scales", method.expert_parameters_model, "mask_scale", scale)
    for density in densities:
        _check_value("--densities", method.parameters_model, "density", density)
    asking = Asking(
        open_store(recipe.output, create=True),
        settings,
        executor or SerialExecutor(),
        progress or LogProgress(),
    )
    own_targets, mixed_targets = ask_experts(recipe, questions, asking)
    sweep = _Sweep(recipe, asking, own_targets, mixed_targets)
    return sweep.run(scales or SCALES[recipe.method], densities)


def _check_value(option: str, model: type[BaseModel], name: str, value: float) -> None:
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        raise RecipeError(f"{option}: {value:g}: {error.errors()[0]['msg']}") from None


class _Sweep:
    """The composites of a calibration, built and measured."""

    def __init__(
        self,
        recipe: Recipe,
        asking: Asking,
        own_targets: Mapping[str, Targets],
        mixed_targets: Targets,
    ) -> None:
        self.recipe, self.asking = recipe, asking
        self.own, self.mixed = own_targets, mixed_targets
        self.has_density = hasattr(recipe.parameters, "density")

    def run(self, scales: Sequence[float], densities: Sequence[float]) -> Calibration:
        recipe_density = float(getattr(self.recipe.parameters, "density", 1.0))
        grid = []
        for density in sorted(set(densities or (recipe_density,))):
            for scale in sorted(set(scales)):
                grid.append(Place(density, dict.fromkeys(self.own, scale)))
        points = self._measure(grid)
        density, best_scales, shared_scales = choose(points)
        shared_points = [
            point
            for point in points
            if point.density == density and point.mask_scale == shared_scales[point.expert]
        ]
        best_points: Sequence[Point] = ()
        if best_scales != shared_scales:
            best_points = self._measure([Place(density, best_scales)])
        is_shared_better = not best_points or _mean(best_points) < _mean(shared_points)
        return Calibration(
            points=tuple(points),
            density=density,
            mask_scales=shared_scales if is_shared_better else best_scales,
            chosen=tuple(shared_points if is_shared_better else best_points),
            is_shared=is_shared_better and best_scales != shared_scales,
            num_prompts={name: len(targets.prompts) for name, targets in self.own.items()},
            num_mixed=len(self.mixed.prompts),
        )

    def _measure(self, places: Sequence[Place]) -> list[Point]:
        """Return a point per place and expert."""
        tasks_by_place = [self._make_tasks(self._build(place), place) for place in places]
        tasks = [task for place_tasks in tasks_by_place for task in place_tasks.all]
        # A process keeps the model it loaded last: tasks of one model follow each other, those of
        # the composite before those of its reconstructed experts.
        self.asking.run(sorted(tasks, key=lambda task: (task.model, task.expert or "")))
        points = []
        for place, place_tasks in zip(places, tasks_by_place, strict=True):
            points += [self._make_point(name, place, place_tasks) for name in self.own]
        return points

    def _build(self, place: Place) -> Model:
        """Return the composite at a place, built under a name of its own."""
        experts = []
        for expert in self.recipe.experts:
            update = {"mask_scale": place.scales[expert.name]}
            experts.append(replace(expert, parameters=expert.parameters.model_copy(update=update)))
        parameters = self.recipe.parameters
        if self.has_density:
            parameters = parameters.model_copy(update={"density": place.density})
        recipe = replace(
            self.recipe,
            name=f"{self.recipe.name}-calibrate",
            experts=tuple(experts),
            parameters=parameters,
            schedules={},
        )
        plan = make_plan(recipe)
        report = run(plan, executor=self.asking.executor, progress=self.asking.progress)
        uri = f"{self.asking.store.uri}#{report.build}"
        return Model.open(report.build[:SHOWN_DIGITS], uri)

    def _make_tasks(self, composite: Model, place: Place) -> PlaceTasks:
        rebuilt, expanded = {}, {}
        for name, targets in self.own.items():
            expert = replace(composite, expert=name)
            scale = f"{place.scales[name]:g}"
            rebuilt[name] = self._make_task(expert, targets, shard=f"{name} rebuilt at {scale}")
            expanded[name] = self._make_task(
                composite, targets, shard=f"{name} expanded at {scale}"
            )
        mixed = None
        if self.mixed.prompts:
            mixed = self._make_task(composite, self.mixed, shard="mixed prompts")
        return PlaceTasks(rebuilt, expanded, mixed)

    def _make_task(self, model: Model, targets: Targets, *, shard: str) -> AnswerTask:
        return make_answer_task(
            model,
            targets.prompts,
            shard=shard,
            settings=self.asking.settings,
            targets=targets.answers,
        )

    def _make_point(self, name: str, place: Place, tasks: PlaceTasks) -> Point:
        mixed_likelihoods = []
        if tasks.mixed is not None:
            likelihoods = self._read_likelihoods(tasks.mixed)
            for likelihood, experts in zip(likelihoods, self.mixed.experts, strict=True):
                if name in experts:
                    mixed_likelihoods.append(likelihood)
        return Point(
            density=place.density,
            mask_scale=place.scales[name],
            expert=name,
            rebuilt=_to_agreement(self._read_likelihoods(tasks.rebuilt[name])),
            expanded=_to_agreement(self._read_likelihoods(tasks.expanded[name])),
            mixed=_to_agreement(mixed_likelihoods) if mixed_likelihoods else None,
        )

    def _read_likelihoods(self, task: AnswerTask) -> list[Likelihood]:
        from mmerge.workers.tasks.answer import Likelihood, read_answers

        results = read_answers(self.asking.store, task.key)
        return [result for result in results if isinstance(result, Likelihood)]


def _to_agreement(likelihoods: Sequence[Likelihood]) -> Agreement:
    count = len(likelihoods)
    mean_log_probability = sum(item.log_probability for item in likelihoods) / count
    num_same = sum(item.is_greedy for item in likelihoods)
    return Agreement(math.exp(mean_log_probability), num_same / count)


def choose(points: Sequence[Point]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return the best density, the best scale of every expert, and the best scale that all share.

    Among equals the smaller value wins.
    """
    experts = list(dict.fromkeys(point.expert for point in points))
    densities = sorted({point.density for point in points})
    best_density, best_points = densities[0], _find_best_points(points, densities[0])
    for density in densities[1:]:
        candidates = _find_best_points(points, density)
        if _mean(candidates.values()) > _mean(best_points.values()):
            best_density, best_points = density, candidates
    points_by_scale: dict[float, list[Point]] = {}
    for point in points:
        if point.density == best_density:
            points_by_scale.setdefault(point.mask_scale, []).append(point)
    shared_scale = max(points_by_scale, key=lambda scale: (_mean(points_by_scale[scale]), -scale))
    best_scales = {name: best_points[name].mask_scale for name in experts}
    return best_density, best_scales, dict.fromkeys(experts, shared_scale)


def _find_best_points(points: Sequence[Point], density: float) -> dict[str, Point]:
    """Return every expert's best point at a density; of equals the one with the smaller scale."""
    best_points: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point.mask_scale):
        if point.density != density:
            continue
        best = best_points.get(point.expert)
        if best is None or point.objective > best.objective:
            best_points[point.expert] = point
    return best_points


def _mean(points: Iterable[Point]) -> float:
    objectives = [point.objective for point in points]
    return sum(objectives) / len(objectives)
