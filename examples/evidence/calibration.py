"""Mask scales chosen by `mmerge calibrate` without labels, and with labels.

Both choices see the same validation prompts, the same grid, and give retention, expansion and mixed
prompts the same weights. They differ in one
thing: what is made large is the probability of the experts' own answers, or the share of right
answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from evidence.measure import Counts, Job, Place, keep, measure_all, open_pool, revision
from evidence.sets import VALIDATION_SEED, load_set, set_names
from evidence.tables import experts_of
from mmerge.manifests.digest import digest_json
from mmerge.pipeline import parse_recipe
from mmerge.pipeline.evaluation.answer_tasks import Settings
from mmerge.pipeline.evaluation.calibrate import SCALES, Calibration, calibrate, weigh
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.monitoring.progress import SeveralProgress

VERSION = 1


@dataclass(frozen=True)
class Scales:
    """Mask scales by expert, chosen each way on validation prompts."""

    without_labels: Calibration | None = None
    tall: dict[str, float] = field(default_factory=dict)
    """TALL's, without labels."""
    with_labels: dict[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    """Where the results lie, and how long they took."""

    @property
    def mmer(self) -> dict[str, float]:
        """MMER's, without labels; empty where nothing was calibrated."""
        return self.without_labels.mask_scales if self.without_labels else {}


def choose_scales(place: Place, available: set[str], *, workers: int) -> Scales:
    """Calibrate both ways; finished parts of an earlier run are not repeated."""
    modalities = tuple(m for m in ("image", "audio", "video", "point") if m in available)
    files = {method: _file(place, modalities, method) for method in ("mmer", "tall_masks")}
    with open_pool(place, workers) as pool:  # processes start when they are given work
        for future in [
            pool.submit(_keep, path, place, modalities, method)
            for method, path in files.items()
            if not path.exists()
        ]:
            future.result()
    raw = {method: _keep(path, place, modalities, method) for method, path in files.items()}
    calibrations = {
        method: TypeAdapter(Calibration).validate_python(value) for method, value in raw.items()
    }
    labels, jobs = _with_labels(place, modalities, workers=workers)
    return Scales(
        calibrations["mmer"],
        calibrations["tall_masks"].mask_scales,
        labels,
        (*files.values(), *jobs),
    )


def _file(place: Place, modalities: tuple[str, ...], method: str) -> Path:
    revisions = [revision(str(Path(place.checkpoints) / name)) for name in ("base", *modalities)]
    key = digest_json(
        [VERSION, method, revisions, list(SCALES[method]), vars(place.sizes), VALIDATION_SEED]
    )
    return Path(place.work) / "calibrations" / f"{key}.json"


def _keep(path: Path, place: Place, modalities: tuple[str, ...], method: str) -> Any:
    return keep(path, lambda: asdict(_without_labels(place, modalities, method)))


def _without_labels(place: Place, modalities: tuple[str, ...], method: str) -> Calibration:
    name = f"calibrated-{method.replace('_', '-')}"
    raw = {
        "method": method,
        "name": name,
        "base": "base",
        "output": place.store,
        "experts": experts_of(modalities),
    }
    questions = [
        Question(f"{who}-{index}", prompt.task, parts=prompt.parts)
        for who in set_names(modalities)["validation"]
        for index, prompt in enumerate(load_set(who, VALIDATION_SEED, place.sizes))
    ]
    return calibrate(
        parse_recipe(raw, folder=Path(place.checkpoints)),
        questions,
        settings=Settings(max_new_tokens=8, batch_size=64),
        executor=SerialExecutor(num_threads=1),
        progress=SeveralProgress([]),
    )


def _with_labels(
    place: Place, modalities: tuple[str, ...], *, workers: int
) -> tuple[dict[str, float], list[Path]]:
    """Return the scale with the most right answers per expert, and the result files.

    Of equal scales the smallest is taken.
    """
    validation = replace(place, seeds=(VALIDATION_SEED,))
    sets = tuple(set_names(modalities)["validation"])
    jobs = {}
    for scale in SCALES["mmer"]:
        recipe = {"method": "mmer", "mask_scale": scale, "experts": experts_of(modalities)}
        jobs[(None, scale)] = Job("calibration", "", recipe, sets)
        jobs |= {
            (m, scale): Job("calibration", "", recipe, (f"validation/{m}",), m) for m in modalities
        }
    places = {id(job): where for where, job in jobs.items()}
    counts = {
        places[id(job)]: job_counts
        for job, job_counts in measure_all(
            [*jobs.values()], validation, workers=workers, seconds=math.inf
        )
    }

    def objective(m: str, scale: float) -> float:
        mixes = [name for name in sets if "+" in name and m in name.partition("/")[2].split("+")]
        rebuilt, expanded = (
            _accuracy(counts[(who, scale)], [f"validation/{m}"]) for who in (m, None)
        )
        return weigh(rebuilt, expanded, _accuracy(counts[(None, scale)], mixes) if mixes else None)

    chosen = {
        m: max(SCALES["mmer"], key=lambda scale: (objective(m, scale), -scale)) for m in modalities
    }
    return chosen, [job.file(validation) for job in jobs.values()]


def _accuracy(counts: Counts, names: list[str]) -> float:
    pairs = [
        pair for name in names for by_task in counts[name].values() for pair in by_task.values()
    ]
    return sum(right for right, _ in pairs) / sum(total for _, total in pairs)


def count_prompts(place: Place, modalities: Mapping[str, object]) -> tuple[int, int]:
    """Validation prompts of one modality, and of several."""
    names = set_names(tuple(modalities))["validation"]
    counts = [(len(load_set(name, VALIDATION_SEED, place.sizes)), "+" in name) for name in names]
    return sum(count for count, mixed in counts if not mixed), sum(
        count for count, mixed in counts if mixed
    )
