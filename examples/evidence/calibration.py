"""Mask scales chosen without labels, by `mmerge calibrate`'s own code, beside scales chosen with labels."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from evidence.measure import Counts, Job, Place, measure, start_worker
from evidence.rows import Row, make_rows
from evidence.sets import VALIDATION_SEED, load_set, set_names
from evidence.tables import experts_of, original
from mmerge.pipeline import parse_recipe
from mmerge.pipeline.calibrate import SCALES, Calibration, calibrate
from mmerge.pipeline.evaluate import Settings
from mmerge.pipeline.executor import SerialExecutor
from mmerge.pipeline.progress import SeveralProgress
from mmerge.pipeline.questions import Question

PROMPTS_PER_EXPERT = 24
TABLE = "calibration"


@dataclass(frozen=True)
class Found:
    """What was chosen each way, and how it does on the test prompts."""

    rows: list[Row] = field(default_factory=list)
    without_labels: Calibration | None = None
    with_labels: dict[str, float] = field(default_factory=dict)
    num_labelled: int = 0


def measure_calibration(place: Place, available: set[str], *, seconds: float) -> Found:
    """Calibrate both ways on validation prompts, and measure on the test prompts; nothing is begun after `seconds`."""
    if seconds <= 0 and not (Path(place.work) / "calibrated").exists():
        return Found()
    began = time.monotonic()
    start_worker(place)
    modalities = tuple(m for m in ("image", "audio", "video", "point") if m in available)
    without = _without_labels(place, modalities)
    labels = _with_labels(place, modalities)
    (Path(place.work) / "calibrated").touch()
    rows = _test(place, modalities, {"λ = 0.75 for all": {}, "without labels": without.mask_scales, "with labels": labels})
    print(f"calibrated and measured in {time.monotonic() - began:.0f} s", flush=True)
    return Found(rows, without, labels, place.sizes.single * len(modalities))


def _without_labels(place: Place, modalities: tuple[str, ...]) -> Calibration:
    raw = {"method": "mmer", "name": "calibrated", "base": "base", "output": place.store, "experts": experts_of(modalities)}
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
    for scale in SCALES:
        recipe = {"method": "mmer", "mask_scale": scale, "experts": experts_of(modalities)}
        for m in modalities:
            for expert in (m, None):
                counts = measure(Job(TABLE, "", recipe, (f"validation/{m}",), expert), validation)
                right[(m, scale)] = right.get((m, scale), 0.0) + _accuracy(counts)
    return {m: max(SCALES, key=lambda scale: (right[(m, scale)], -scale)) for m in modalities}


def _accuracy(counts: Counts) -> float:
    pairs = [pair for by_seed in counts.values() for by_task in by_seed.values() for pair in by_task.values()]
    return sum(right for right, _ in pairs) / sum(total for _, total in pairs)


def _test(place: Place, modalities: tuple[str, ...], choices: dict[str, dict[str, float]]) -> list[Row]:
    sets = set_names(modalities)
    jobs = [Job("retention", "original", original(m), (f"single/{m}",), m) for m in modalities]
    for label, scales in choices.items():
        experts = {name: {**expert, **({"mask_scale": scales[name]} if scales else {})} for name, expert in experts_of(modalities).items()}
        recipe = {"method": "mmer", "experts": experts}
        jobs += [Job(TABLE, label, recipe, (f"single/{m}",), m) for m in modalities]
        jobs.append(Job(TABLE, label, recipe, tuple(sets["mix"])))
    return [row for row in make_rows([(job, measure(job, place)) for job in jobs]) if row.table == TABLE]
