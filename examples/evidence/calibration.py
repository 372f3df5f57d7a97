"""Mask scales chosen without labels, by `mmerge calibrate`'s own code, beside scales chosen with labels."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from evidence.measure import Counts, Job, Place, measure, start_worker
from evidence.sets import VALIDATION_SEED, load_set
from evidence.tables import experts_of
from mmerge.pipeline import parse_recipe
from mmerge.pipeline.calibrate import SCALES, Calibration, calibrate
from mmerge.pipeline.evaluate import Settings
from mmerge.pipeline.executor import SerialExecutor
from mmerge.pipeline.progress import SeveralProgress
from mmerge.pipeline.questions import Question

PROMPTS_PER_EXPERT = 24


@dataclass(frozen=True)
class Scales:
    """Mask scales by expert, chosen each way on validation prompts."""

    without_labels: Calibration | None = None
    tall: dict[str, float] = field(default_factory=dict)
    """TALL's, without labels."""
    with_labels: dict[str, float] = field(default_factory=dict)
    num_labelled: int = 0

    @property
    def mmer(self) -> dict[str, float]:
        """MMER's, without labels; empty where nothing was calibrated."""
        return self.without_labels.mask_scales if self.without_labels else {}


def choose_scales(place: Place, available: set[str]) -> Scales:
    """Calibrate both ways; finished parts of an earlier run are not repeated."""
    began = time.monotonic()
    start_worker(place)
    modalities = tuple(m for m in ("image", "audio", "video", "point") if m in available)
    without = _without_labels(place, modalities, method="mmer")
    tall = _without_labels(place, modalities, method="tall_masks").mask_scales
    labels = _with_labels(place, modalities)
    print(f"calibrated in {time.monotonic() - began:.0f} s: {without.mask_scales}, TALL {tall}, with labels {labels}", flush=True)
    return Scales(without, tall, labels, place.sizes.single * len(modalities))


def _without_labels(place: Place, modalities: tuple[str, ...], *, method: str) -> Calibration:
    raw = {"method": method, "name": "calibrated", "base": "base", "output": place.store, "experts": experts_of(modalities)}
    questions = [
        Question(f"{m}-{index}", prompt.task, parts=prompt.parts)
        for m in modalities
        for index, prompt in enumerate(load_set(f"validation/{m}", VALIDATION_SEED, place.sizes)[:PROMPTS_PER_EXPERT])
    ]
    return calibrate(
        parse_recipe(raw, folder=Path(place.checkpoints)),
        questions,
        settings=Settings(max_new_tokens=8, batch_size=24),
        executor=SerialExecutor(num_threads=1),
        progress=SeveralProgress([]),
    )


def _with_labels(place: Place, modalities: tuple[str, ...]) -> dict[str, float]:
    """The scale of each expert with the most right answers on all validation prompts, rebuilt and expanded; among equals the smallest."""
    validation = replace(place, seeds=(VALIDATION_SEED,))
    right: dict[tuple[str, float], float] = {}
    for scale in SCALES["mmer"]:
        recipe = {"method": "mmer", "mask_scale": scale, "experts": experts_of(modalities)}
        for m in modalities:
            for expert in (m, None):
                counts = measure(Job("calibration", "", recipe, (f"validation/{m}",), expert), validation)
                right[(m, scale)] = right.get((m, scale), 0.0) + _accuracy(counts)
    return {m: max(SCALES["mmer"], key=lambda scale: (right[(m, scale)], -scale)) for m in modalities}


def _accuracy(counts: Counts) -> float:
    pairs = [pair for by_seed in counts.values() for by_task in by_seed.values() for pair in by_task.values()]
    return sum(right for right, _ in pairs) / sum(total for _, total in pairs)
