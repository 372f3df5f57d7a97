"""The papers' tables on the lab's experts: docs/reproduction.md, docs/reproduction.json and plots.

    python examples/reproduce.py [--minutes 38] [--workers 2] [--checkpoints DIR] [--docs DIR]

Results of finished jobs are kept below build/reproduce, so a second run continues where the first
one ended. What was not measured in time is named on the page.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from evidence import calibration, page
from evidence.changes import find_changes
from evidence.measure import Effort, Place, build, keep, measure_all, start_worker, sum_seconds
from evidence.rows import make_rows
from evidence.sets import VALIDATION_SEED, Sizes, encode_sets, set_names
from evidence.tables import Jobs, experts_of
from lab import points, twins

from mmerge.pipeline import Composite, load_composite

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "examples" / "lab" / "checkpoints"
EXPECTED = (
    "image",
    "audio",
    "video",
    "point",
    "image_new",
    "audio_new",
    "twins/image",
    "twins/audio",
    "twins/video",
    "twins/point",
)


def find_available(checkpoints: Path) -> set[str]:
    """The experts that there are, by folder."""
    return {
        str(path.parent.relative_to(checkpoints)) for path in checkpoints.rglob("*.safetensors")
    }


def encode_all(place: Place, available: set[str]) -> tuple[str, ...]:
    """Encode every input of every set once per expert that reads it; return the files."""
    modalities = tuple(m for m in EXPECTED[:4] if m in available)
    groups = set_names(modalities)
    seeded = {
        group: [(name, seed) for name in names for seed in place.seeds]
        for group, names in groups.items()
    }
    shared = [*seeded["single"], *seeded["mix"], *seeded["share"]]
    validation = [(name, VALIDATION_SEED) for name in groups["validation"]]
    files: list[Path] = []

    def encode(
        names: tuple[str, ...],
        sets: list[tuple[str, int]],
        *,
        method: str = "naive_mc",
        prepare: Any = None,
    ) -> None:
        owners = {expert["modality"]: name for name, expert in experts_of(names).items()}
        path = place.embeddings_of([expert["path"] for expert in experts_of(names).values()])
        files.append(path)

        def make() -> None:
            composite = open_experts(names, place, method=method)
            save(
                path,
                encode_sets(
                    composite,
                    sets,
                    place.sizes,
                    owners=owners,
                    **({"prepare": prepare} if prepare else {}),
                ),
            )

        keep(path.with_suffix(".json"), make)

    # Twins take features, so they are encoded before the point-cloud encoder is registered.
    if all(f"twins/{m}" in available for m in modalities):
        prepare = partial(twins.to_features, checkpoints=Path(place.checkpoints))
        encode(tuple(f"twin_{m}" for m in modalities), shared, method="damc", prepare=prepare)
    points.register()
    encode(modalities, [*shared, *seeded["new"], *seeded["many"], *validation])
    for m in [m for m in ("image", "audio") if f"{m}_new" in available and m in modalities]:
        encode(
            (f"{m}_new",),
            [(name, seed) for name in (f"single/{m}", f"new/{m}") for seed in place.seeds],
        )
    return tuple(str(path) for path in files)


def open_experts(names: tuple[str, ...], place: Place, *, method: str = "naive_mc") -> Composite:
    """A composite that holds the experts' own encoders."""
    return load_composite(
        build({"method": method, "experts": experts_of(names)}, place), dtype=torch.float32
    )


def save(path: Path, table: dict[tuple[str, str], torch.Tensor]) -> None:
    """Write embeddings, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(table, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=38, help="no further measurement starts after this time"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--checkpoints", type=Path, default=LAB)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reproduce")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--single", type=int, default=Sizes.single, help="prompts per modality and seed"
    )
    parser.add_argument(
        "--mixed", type=int, default=Sizes.mixed, help="prompts per mix of modalities and seed"
    )
    parser.add_argument("--tables", nargs="*", help="of which tables jobs are run; all if absent")
    chosen = parser.parse_args()
    began, started = time.monotonic(), time.time()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    place = Place(
        str(chosen.checkpoints.resolve()),
        str(chosen.work.resolve()),
        Sizes(chosen.single, chosen.mixed),
    )
    available = find_available(chosen.checkpoints)
    place = replace(place, embeddings=encode_all(place, available))
    tell = partial(report, began)
    tell("media encoded")
    start_worker(place)
    scales = calibration.choose_scales(place, available, workers=chosen.workers)
    tell(f"calibrated: {scales.mmer}, TALL {scales.tall}, with labels {scales.with_labels}")
    jobs = Jobs(available, mmer=scales.mmer, tall=scales.tall, labelled=scales.with_labels).make()
    selected = [
        job
        for job in jobs
        if not chosen.tables or any(job.table.startswith(name) for name in chosen.tables)
    ]
    results = {}
    left = 60 * chosen.minutes - (time.monotonic() - began)
    for number, (job, counts) in enumerate(
        measure_all(selected, place, workers=chosen.workers, seconds=left), start=1
    ):
        results[id(job)] = counts
        tell(f"{number}/{len(selected)}  {job.table}: {job.method} {job.expert or 'expanded'}")
    rows = make_rows([(job, results[id(job)]) for job in jobs if id(job) in results])
    missing = list(
        dict.fromkeys(f"{job.table}: {job.method}" for job in jobs if id(job) not in results)
    )
    missing += [
        f"everything with {name}: no such checkpoint" for name in EXPECTED if name not in available
    ]
    changes = find_changes(place, tuple(m for m in EXPECTED[:4] if m in available), scales.mmer)
    files = [
        *(Path(path).with_suffix(".json") for path in place.embeddings),
        *scales.files,
        *(job.file(place) for job in jobs),
    ]
    effort = Effort(
        sum_seconds(files),
        sum_seconds(files, since=started),
        time.monotonic() - began,
        chosen.workers,
    )
    page.write_page(
        chosen.docs,
        rows,
        missing=missing,
        place=place,
        scales=scales,
        changes=changes,
        effort=effort,
    )


def report(began: float, text: str) -> None:
    """Print what was done, and when."""
    print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
