"""Measurement jobs: build, load, and count right answers.

Results are stored, so that an interrupted run continues.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from evidence import ablations
from evidence.sets import SEEDS, Prompt, Sizes, load_set, register_lookups
from mmerge.manifests.digest import digest_bytes, digest_json
from mmerge.pipeline import Composite, load_composite, make_plan, parse_recipe, run
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.monitoring.progress import SeveralProgress
from mmerge.workers.modalities.prompt import Part

VERSION = 3
BATCH = 64
Counts = dict[str, dict[str, dict[str, tuple[int, int]]]]
"""By set, seed and task: right answers, and questions."""


@dataclass(frozen=True)
class Place:
    """Where checkpoints are, and where results go."""

    checkpoints: str
    work: str
    sizes: Sizes = field(default_factory=Sizes)
    seeds: tuple[int, ...] = SEEDS
    embeddings: tuple[str, ...] = ()
    """The files of encoded media."""

    @property
    def store(self) -> str:
        """The store of all composites."""
        return str(Path(self.work) / "store")

    def embeddings_of(self, folders: Sequence[str]) -> Path:
        """The file of media encoded by these experts."""
        revisions = [revision(str(Path(self.checkpoints) / folder)) for folder in folders]
        digest = digest_json([revisions, vars(self.sizes), list(self.seeds)])[:16]
        name = f"{folders[0].replace('/', '-')}-{digest}.pt"
        return Path(self.work) / "embeddings" / name


@dataclass(frozen=True)
class Job:
    """One model and the sets it is asked.

    `recipe` is that of its build, without name, base and output; experts by name and folder.
    `expert` is rebuilt alone, or tokens are routed by modality if it is None. `only`: of other
    modalities' media nothing is shown. `text`: the recipe of another model, whose weights text
    tokens run through, or None.
    """

    table: str
    method: str
    recipe: dict[str, Any]
    sets: tuple[str, ...]
    expert: str | None = None
    only: str | None = None
    text: dict[str, Any] | None = None

    def key(self, place: Place) -> str:
        """What the result depends on."""
        folders = [expert["path"] for expert in self.recipe["experts"].values()]
        revisions = [
            revision(str(Path(place.checkpoints) / folder)) for folder in ["base", *folders]
        ]
        return digest_json(
            [
                VERSION,
                self.recipe,
                revisions,
                list(self.sets),
                self.expert,
                self.only,
                list(place.seeds),
                vars(place.sizes),
                self.text,
            ]
        )

    def file(self, place: Place) -> Path:
        """Where the result lies."""
        return Path(place.work) / "jobs" / f"{self.key(place)}.json"


@dataclass(frozen=True)
class Effort:
    """Seconds spent: processor time in all and in this run, and wall time of this run."""

    processor: float
    processor_now: float
    clock: float
    workers: int

    def describe(self) -> str:
        """Return the time spent, earlier runs that this one continued included, as a phrase."""
        whole, now = self.processor / 60, self.processor_now / 60
        clock = (
            f"{self.clock / 60:.0f} minutes of wall time with {self.workers} processes of one"
            " thread each"
        )
        if now >= 0.99 * whole:
            return f"{whole:.0f} minutes of processor time, all of them in this run: {clock}"
        return (
            f"{whole:.0f} minutes of processor time in all; {now:.0f} of them in this run, which"
            f" took {clock} and reused the other results"
        )


@cache
def revision(folder: str) -> str:
    """The digest of a checkpoint's weights."""
    return digest_json(
        [digest_bytes(path.read_bytes()) for path in sorted(Path(folder).rglob("*.safetensors"))]
    )


def build(recipe: dict[str, Any], place: Place) -> str:
    """Build a recipe of the lab's checkpoints in the place's store; return the build's URI."""
    raw = {
        "base": "base",
        "output": place.store,
        "template": "{media}question : {text} answer :",
        **recipe,
    }
    raw["name"] = f"job-{digest_json(raw)[:16]}"
    plan = make_plan(parse_recipe(raw, folder=Path(place.checkpoints)))
    report = run(plan, executor=SerialExecutor(num_threads=1), progress=SeveralProgress([]))
    return f"{place.store}#{report.build}"


@torch.inference_mode()
def count_right(
    composite: Composite, prompts: Sequence[Prompt], *, only: str | None = None
) -> dict[str, tuple[int, int]]:
    """Return, by task, the number of right answers and of questions.

    An answer is right if greedy decoding gives it and then the end token.
    """
    counts: dict[str, tuple[int, int]] = {}
    for start in range(0, len(prompts), BATCH):
        chunk = prompts[start : start + BATCH]
        shown = [
            [part for part in prompt.parts if only is None or part.kind in ("text", only)]
            for prompt in chunk
        ]
        answers = [to_tokens(composite, prompt.answer) for prompt in chunk]
        for prompt, (_, is_right) in zip(
            chunk, composite.score([_named(p, composite) for p in shown], answers), strict=True
        ):
            right, total = counts.get(prompt.task, (0, 0))
            counts[prompt.task] = (right + is_right, total + 1)
    return counts


def to_tokens(composite: Composite, answer: str) -> list[int]:
    """The tokens of an answer and the end token."""
    return [
        *composite.tokenizer(answer, add_special_tokens=False)["input_ids"],
        composite.tokenizer.eos_token_id,
    ]


def _named(parts: Sequence[Part], composite: Composite) -> list[Part]:
    """Return the parts, each input under the name of the first expert of its modality.

    For composite models with several experts of one modality.
    """
    first: dict[str, str] = {}
    for record in composite.manifest.experts:
        if record.name in composite.encoders:
            first.setdefault(record.modality, record.name)
    return [
        part if part.kind == "text" else Part(first.get(part.kind, part.kind), part.value)
        for part in parts
    ]


def open_job(job: Job, place: Place) -> Composite:
    """The job's model, in float32, its weights resident: they are small."""
    mode = "retention" if job.expert else "expansion"
    composite = load_composite(
        build(job.recipe, place),
        mode=mode,
        expert=job.expert,
        dtype=torch.float32,
        policy="resident",
    )
    if job.text is not None:
        # Weights kept per modality are buffers; the parameters are those of text tokens, by the
        # same names in every composite.
        text_model = load_composite(
            build(job.text, place), mode=mode, dtype=torch.float32, policy="resident"
        )
        weights = dict(text_model.language_model.named_parameters())
        for name, parameter in composite.language_model.named_parameters():
            parameter.data.copy_(weights[name])
    return composite


def measure(job: Job, place: Place) -> Counts:
    """The job's result, from the folder of results where it is there already."""

    def count() -> Counts:
        composite = open_job(job, place)
        return {
            name: {
                str(seed): count_right(composite, load_set(name, seed, place.sizes), only=job.only)
                for seed in place.seeds
            }
            for name in job.sets
        }

    return dict(keep(job.file(place), count))


def keep(path: Path, make: Callable[[], Any]) -> Any:
    """Return a result as JSON, from its file or computed now and stored with its CPU time."""
    if not path.exists():
        began = time.process_time()
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"value": value, "cpu_seconds": time.process_time() - began}))
        partial.rename(path)
    return json.loads(path.read_text())["value"]


def sum_seconds(files: Iterable[Path], *, since: float = 0.0) -> float:
    """Return the processor time of stored results, of those since a wall time if given."""
    return sum(
        json.loads(path.read_text())["cpu_seconds"]
        for path in set(files)
        if path.exists() and path.stat().st_mtime >= since
    )


def start_worker(place: Place) -> None:
    """Prepare a process for jobs: one thread, the ablations, and embedding look-up."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    logging.getLogger("mmerge").setLevel(logging.WARNING)
    ablations.register()
    register_lookups(place.embeddings)


def open_pool(place: Place, workers: int) -> ProcessPoolExecutor:
    """Processes that are ready for jobs."""
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(place,)
    )


def measure_all(
    jobs: Sequence[Job], place: Place, *, workers: int, seconds: float
) -> Iterator[tuple[Job, Counts]]:
    """Yield results as they arrive; after `seconds` no further job is started.

    Jobs are started in the order given.
    """
    end = time.monotonic() + seconds
    if workers == 1:
        start_worker(place)
        for job in jobs:
            if time.monotonic() < end or job.file(place).exists():
                yield job, measure(job, place)
        return
    with open_pool(place, workers) as pool:
        waiting = {
            pool.submit(_measure_before, job, place, time.time() + end - time.monotonic()): job
            for job in jobs
        }
        for future in as_completed(waiting):
            counts = future.result()
            if counts is not None:
                yield waiting[future], counts


def _measure_before(job: Job, place: Place, deadline: float) -> Counts | None:
    if time.time() > deadline and not job.file(place).exists():
        return None
    return measure(job, place)
