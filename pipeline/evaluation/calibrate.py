"""Choose mask scales and density without labels: the experts' own answers say what a composite
should answer.

A sweep builds the composite at every mask scale of a grid. Surveys, base and carried tensors are
shared by all of these builds, so each costs one merge of what is already surveyed. One build serves
all experts: an expert's mask depends on its own scale alone. (The mean mask of text tokens depends
on all scales; the chosen ones are therefore measured together at the end.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ValidationError

from mmerge.manifests.errors import RecipeError
from mmerge.manifests.stores.open import is_local, open_store
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.evaluate import Model, Settings, make_answer_task
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
"""Mask scales to try, by method. Published are 0.6 to 0.9 for MMER, 0.2 to 0.6 for TALL masks; the
grids reach beyond on both sides.
"""


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with an expert's own greedy answers, over that expert's prompts."""

    probability: float
    """exp of the mean log-probability per token of the expert's answers: 1 where the model is sure
    of all of them.
    """
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
    """On prompts of the expert's own modality."""
    mixed: Agreement | None = None
    """On prompts of several modalities, of which the expert's is one; None where there are none."""

    @property
    def objective(self) -> float:
        """What the choice makes large: the mean of retention and expansion, and of expansion the
        mean of own and mixed prompts.
        """
        return weigh(
            self.rebuilt.probability,
            self.expanded.probability,
            None if self.mixed is None else self.mixed.probability,
        )


def weigh(rebuilt: float, expanded: float, mixed: float | None) -> float:
    """Return the mean of retention and expansion; expansion is the mean of own and mixed prompts,
    where there are mixed ones.
    """
    return (rebuilt + (expanded if mixed is None else (expanded + mixed) / 2)) / 2


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
    """Of each expert's own modality alone."""
    num_mixed: int = 0
    """Prompts of several modalities."""


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
    """Return the mask scale per expert, and the density, at which the composite agrees best with
    the experts' own answers.

    Args:
        recipe: of a method with mask scales (`mmer`, `tall_masks`); sweeps are built in its store.
        questions: some for each expert with media of its modality alone, and some of several
            modalities, if there are any; right answers are not looked at.
        scales: the grid of mask scales, SCALES of the method if empty. densities: those to try; the
            recipe's own if empty.
        settings: how prompts are asked. executor: where everything runs. progress: told of every
            task.

    Raises:
        RecipeError: the method has no mask scales, a modality has several experts, an expert has no
            prompt, or a prompt no expert.
    """
    method = find_method(recipe.method)
    if "mask_scale" not in method.expert_parameters_model.model_fields:
        raise RecipeError(
            f"method: {recipe.method!r} has no mask scales to calibrate; 'mmer' and 'tall_masks'"
            " have"
        )
    if densities and "density" not in method.parameters_model.model_fields:
        raise RecipeError(f"--densities: method {recipe.method!r} has none")
    for scale in scales:
        _check("--scales", method.expert_parameters_model, {"mask_scale": scale})
    for density in densities:
        _check("--densities", method.parameters_model, {"density": density})
    asking = Asking(
        open_store(recipe.output, create=True),
        settings,
        executor or SerialExecutor(),
        progress or LogProgress(),
    )
    return _Sweep(recipe, asking).run(questions, scales or SCALES[recipe.method], densities)


def _check(option: str, model: type[BaseModel], numbers: Mapping[str, float]) -> None:
    try:
        model.model_validate(numbers)
    except ValidationError as error:
        raise RecipeError(
            f"{option}: {', '.join(f'{number:g}' for number in numbers.values())}:"
            f" {error.errors()[0]['msg']}"
        ) from None


class _Sweep:
    def __init__(self, recipe: Recipe, asking: Asking) -> None:
        self.recipe, self.asking = recipe, asking
        self.has_density = hasattr(recipe.parameters, "density")
        self.own: dict[str, Targets] = {}
        self.mixed = Targets()

    def run(
        self, questions: Sequence[Question], scales: Sequence[float], densities: Sequence[float]
    ) -> Calibration:
        self.own, self.mixed = ask_experts(self.recipe, questions, self.asking)
        wanted = densities or (float(getattr(self.recipe.parameters, "density", 1.0)),)
        points = self._measure(
            [
                (density, dict.fromkeys(self.own, scale))
                for density in sorted({*wanted})
                for scale in sorted({*scales})
            ]
        )
        density, best, shared = choose(points)
        together = self._measure([(density, best)]) if best != shared else ()
        at_shared = [
            point
            for point in points
            if point.density == density and point.mask_scale == shared[point.expert]
        ]
        is_shared = not together or _mean(together) < _mean(at_shared)
        return Calibration(
            tuple(points),
            density,
            shared if is_shared else best,
            tuple(at_shared if is_shared else together),
            is_shared and best != shared,
            {name: len(targets.prompts) for name, targets in self.own.items()},
            len(self.mixed.prompts),
        )

    def _build(self, density: float, scales: Mapping[str, float]) -> Model:
        """Return the composite with these numbers, under a name that says what it is for."""
        experts = tuple(
            replace(
                expert,
                parameters=expert.parameters.model_copy(update={"mask_scale": scales[expert.name]}),
            )
            for expert in self.recipe.experts
        )
        parameters = self.recipe.parameters.model_copy(
            update={"density": density} if self.has_density else {}
        )
        made = replace(
            self.recipe,
            name=f"{self.recipe.name}-calibrate",
            experts=experts,
            parameters=parameters,
            schedules={},
        )
        report = run(make_plan(made), executor=self.asking.executor, progress=self.asking.progress)
        return Model.open(report.build[:12], f"{self.asking.store.uri}#{report.build}")

    def _measure(self, places: Sequence[tuple[float, Mapping[str, float]]]) -> list[Point]:
        """Return a point per place (density, mask scale per expert) and expert."""
        asked = [self._tasks(self._build(density, scales), scales) for density, scales in places]
        # Experts one after the other, expansion first: a process keeps the model that it asked
        # last.
        ordered = sorted(
            (task for tasks in asked for task in tasks.values()),
            key=lambda task: (task.model, task.expert or ""),
        )
        self.asking.run(ordered)
        return [
            self._point(name, density, scales[name], tasks)
            for (density, scales), tasks in zip(places, asked, strict=True)
            for name in self.own
        ]

    def _tasks(
        self, model: Model, scales: Mapping[str, float]
    ) -> dict[tuple[str, str], AnswerTask]:
        """Return the tasks of one composite by expert and use: each expert's prompts rebuilt and
        expanded, and the mixed ones.
        """
        asked = {
            (name, "rebuilt"): (replace(model, expert=name), targets)
            for name, targets in self.own.items()
        }
        asked |= {(name, "expanded"): (model, targets) for name, targets in self.own.items()}
        if self.mixed.prompts:
            asked[("", "mixed")] = (model, self.mixed)
        return {
            (name, use): make_answer_task(
                who, targets.prompts, shard=f"{name} {use} at {scales.get(name, 0.0):g}", settings=self.asking.settings, targets=targets.answers
            )
            for (name, use), (who, targets) in asked.items()
        }  # fmt: skip

    def _point(
        self, name: str, density: float, scale: float, tasks: Mapping[tuple[str, str], AnswerTask]
    ) -> Point:
        rebuilt, expanded = (
            _agreement(self._likelihoods(tasks[(name, use)])) for use in ("rebuilt", "expanded")
        )
        found = (
            zip(self._likelihoods(tasks[("", "mixed")]), self.mixed.experts, strict=True)
            if self.mixed.prompts
            else ()
        )
        mixed = [likelihood for likelihood, experts in found if name in experts]
        return Point(density, scale, name, rebuilt, expanded, _agreement(mixed) if mixed else None)

    def _likelihoods(self, task: AnswerTask) -> list[Likelihood]:
        from mmerge.workers.tasks.answer import Likelihood, read_answers

        return [
            each
            for each in read_answers(self.asking.store, task.key)
            if isinstance(each, Likelihood)
        ]


def _agreement(found: Sequence[Likelihood]) -> Agreement:
    return Agreement(
        math.exp(sum(each.log_probability for each in found) / len(found)),
        sum(each.is_greedy for each in found) / len(found),
    )


def choose(points: Sequence[Point]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return density, the best scale of each expert, and the best scale that all share. Among
    equals the smaller number wins.
    """
    experts = list(dict.fromkeys(point.expert for point in points))

    def best_at(density: float) -> dict[str, Point]:
        return {
            name: max(
                (p for p in points if p.density == density and p.expert == name),
                key=lambda p: (p.objective, -p.mask_scale),
            )
            for name in experts
        }

    densities = sorted({point.density for point in points})
    density = max(densities, key=lambda each: (_mean(best_at(each).values()), -each))
    scales = sorted({point.mask_scale for point in points})
    shared = max(
        scales,
        key=lambda s: (
            _mean([p for p in points if p.density == density and p.mask_scale == s]),
            -s,
        ),
    )
    return (
        density,
        {name: point.mask_scale for name, point in best_at(density).items()},
        dict.fromkeys(experts, shared),
    )


def _mean(points: Iterable[Point]) -> float:
    found = [point.objective for point in points]
    return sum(found) / len(found)


def write_recipe(source: Path, target: Path, found: Calibration, *, with_density: bool) -> None:
    """Write the recipe in `source` with the chosen numbers; its relative paths are made to fit the
    new folder. Comments are not kept.

    Raises:
        RecipeError: the source is no recipe of this project, or the target cannot be written.
    """
    raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("experts"), dict):
        raise RecipeError(
            f"{source}: is no recipe of this project; calibrated numbers: {found.mask_scales},"
            f" density {found.density}"
        )
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
        target.write_text(
            text + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    except OSError as error:
        raise RecipeError(
            f"--to: {target}: cannot be written ({error.strerror or error})"
        ) from error


def _mover(source: Path, target: Path) -> Callable[[str], str]:
    def move(uri: str) -> str:
        if not is_local(uri) or Path(uri).expanduser().is_absolute() or uri.startswith("file://"):
            return uri
        return os.path.relpath(source / uri, target)

    return move
