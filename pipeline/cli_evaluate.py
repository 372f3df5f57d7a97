"""The commands that measure: evaluate and calibrate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.errors import RecipeError

if TYPE_CHECKING:
    from mmerge.pipeline.calibrate import Calibration
    from mmerge.pipeline.evaluate import Model, Settings, TaskScore
    from mmerge.pipeline.executor import Executor
    from mmerge.pipeline.progress import Progress
    from mmerge.pipeline.questions import Question

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

PromptsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='questions: JSON lines {"question": "…", "image": "a.png", "answer": "…"}; may be repeated',
        show_default=False,
    ),
]
MediaOption = Annotated[
    Path | None, typer.Option("--media", metavar="DIR", help="folder of the media; the file's own if absent", show_default=False)
]
EncodersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoders", metavar="MODULE:FUNCTION", help="your own code that registers encoders; called in every process", show_default=False
    ),
]
ExecutorOption = Annotated[str, typer.Option("--executor", metavar="ray|serial", help="where models are asked: on Ray, or in this process")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="address of a Ray cluster; a local Ray is started without one", show_default=False)
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="tasks at once on this machine; all cores if absent", show_default=False)
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="prompts at once")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda: each task then asks for a GPU")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command, name in ((evaluate, "evaluate"), (calibrate, "calibrate")):
        app.command(name)(command)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,expert=E]…",
            help="STORE#NAME, with ',expert=image' to rebuild one; or a checkpoint FOLDER,modality=image",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="folder of the results; a run that was killed continues there")],
    prompts: PromptsOption = None,
    mcub: Annotated[
        list[Path] | None, typer.Option("--mcub", metavar="FILE", help="MCUB's JSON as published; may be repeated", show_default=False)
    ] = None,
    answers: Annotated[Path | None, typer.Option("--answers", metavar="FILE", help="MCUB-answer.json", show_default=False)] = None,
    media: MediaOption = None,
    base: Annotated[
        str | None, typer.Option("--base", help="base LLM of models that are ordinary multimodal checkpoints", show_default=False)
    ] = None,
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="NAME", help="the model that performance retention compares with", show_default=False),
    ] = None,
    max_new_tokens: TokensOption = 64,
    batch: BatchOption = 16,
    encoders: EncodersOption = None,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "ray",
    address: AddressOption = None,
    workers: WorkersOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="ask everything again")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Ask models the same questions and score them: exact match, multiple choice (MCUB too), captions by ROUGE-L.

    Writes answers.parquet, scores.parquet, report.md and plots.
    """
    from mmerge.pipeline.evaluate import evaluate as ask
    from mmerge.pipeline.evaluate import summarise
    from mmerge.pipeline.evaluation_report import write_report
    from mmerge.pipeline.progress import show_progress

    asked = _read_all(prompts, mcub, answers, media)
    settings = _settings(max_new_tokens, batch, encoders, device)
    with _executor(executor, address, workers) as where, show_progress(err) as progress:
        store = str((to / "store").absolute())
        opened = _open_models(models, base=base, store_uri=store, where=where, progress=progress)
        if original is not None and original not in [model.name for model in opened]:
            raise RecipeError(f"--original: there is no model {original!r}; there are {', '.join(model.name for model in opened)}")
        rows = ask(opened, asked, out=store, settings=settings, executor=where, progress=progress, fresh=fresh)
    scores = summarise(rows, original=original)
    written = write_report(to, rows, scores, original=original)
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    _print_scores(scores)
    out.print(f"wrote {escape(', '.join(str(path) for path in written))}")


def _read_all(prompts: list[Path] | None, mcub: list[Path] | None, answers: Path | None, media: Path | None) -> list[Question]:
    from mmerge.pipeline.questions import read_mcub, read_questions

    if not prompts and not mcub:
        raise RecipeError("--prompts: give a file of questions, or --mcub")
    if answers and not mcub:
        raise RecipeError("--answers has no effect without --mcub: leave it out")
    found = [question for path in prompts or [] for question in read_questions(path, media_root=media)]
    return found + [question for path in mcub or [] for question in read_mcub(path, answers=answers, media_root=media)]


def _settings(max_new_tokens: int, batch: int, encoders: list[str] | None, device: str) -> Settings:
    from mmerge.pipeline.evaluate import Settings

    return Settings(max_new_tokens=max_new_tokens, batch_size=batch, encoders=tuple(encoders or ()), device=device)


def _open_models(texts: list[str], *, base: str | None, store_uri: str, where: Executor, progress: Progress) -> list[Model]:
    from mmerge.pipeline.evaluate import Model, is_checkpoint, open_checkpoint

    found: list[Model] = []
    for text in texts:
        name, uri, options = _parse_model(text)
        if is_checkpoint(uri):
            if "expert" in options:
                raise RecipeError(f"{text}: 'expert' has no effect on a checkpoint; say what its encoder reads: modality=image")
            absolute = uri if "://" in uri else str(Path(uri).absolute())
            own_base = base if base is None or "://" in base else str(Path(base).absolute())
            modality = options.get("modality")
            found.append(
                open_checkpoint(
                    name,
                    absolute,
                    base=own_base if modality else None,
                    modality=modality,
                    store_uri=store_uri,
                    executor=where,
                    progress=progress,
                )
            )
        else:
            if "modality" in options:
                raise RecipeError(f"{text}: 'modality' has no effect on a composite; to rebuild one expert say expert=NAME")
            found.append(Model.open(name, uri, expert=options.get("expert")))
    names = [model.name for model in found]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise RecipeError(f"two models are called {repeated[0]!r}; write NAME=MODEL to name them")
    return found


def _parse_model(text: str) -> tuple[str, str, dict[str, str]]:
    """Return name, URI and options of NAME=URI,key=value,…"""
    head, *rest = text.split(",")
    options: dict[str, str] = {}
    for piece in rest:
        key, equals, value = piece.partition("=")
        if key not in ("expert", "modality") or not equals or not value:
            raise RecipeError(f"{text}: {piece!r}: expected expert=NAME or modality=NAME")
        options[key] = value
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9 ._-]*)=(.+)", head)
    uri = match[2] if match else head
    name = match[1] if match else uri.rstrip("/").rpartition("#")[2].rpartition("/")[2]
    return (name if match or "expert" not in options else f"{name}-{options['expert']}"), uri, options


@contextmanager
def _executor(name: str, address: str | None, workers: int | None) -> Iterator[Executor]:
    from mmerge.pipeline.executor import open_executor

    if name not in ("ray", "serial"):
        raise RecipeError(f"--executor: expected 'ray' or 'serial', got {name!r}")
    where = open_executor("serial" if name == "serial" else "ray", address=address, num_workers=workers)
    try:
        yield where
    finally:
        where.close()


def _print_scores(scores: list[TaskScore]) -> None:
    models = list(dict.fromkeys(score.model for score in scores))
    table = Table("task", "metric", box=None, header_style="bold", pad_edge=False)
    for model in models:
        table.add_column(model, justify="right")
    by = {(score.model, score.task): score for score in scores}
    for task in dict.fromkeys(score.task for score in scores):
        found = [by.get((model, task)) for model in models]
        cells = [
            ""
            if each is None
            else f"{each.score:.1%}" + (f" ({each.performance_retention:.1%})" if each.performance_retention is not None else "")
            for each in found
        ]
        table.add_row(task, next(each.metric for each in found if each), *cells)
    out.print(table)


def calibrate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe of 'mmer' or 'tall_masks'")],
    prompts: PromptsOption = None,
    media: MediaOption = None,
    scales: Annotated[str | None, typer.Option("--scales", metavar="0.5,0.6,…", help="mask scales to try", show_default=False)] = None,
    densities: Annotated[
        str | None, typer.Option("--densities", metavar="0.6,0.8,…", help="densities to try; the recipe's if absent", show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="write the recipe with the chosen numbers", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="draw the curve", show_default=False)] = None,
    max_new_tokens: TokensOption = 64,
    batch: BatchOption = 16,
    encoders: EncodersOption = None,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "ray",
    address: AddressOption = None,
    workers: WorkersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Choose mask scales (and density) from a few prompts without labels: by agreement with the experts' own answers."""
    from mmerge.pipeline.calibrate import calibrate as sweep
    from mmerge.pipeline.calibrate import write_recipe
    from mmerge.pipeline.progress import show_progress
    from mmerge.pipeline.recipe import read_recipe

    questions = _read_all(prompts, None, None, media)
    grid = _numbers(scales, "--scales")
    wanted = _numbers(densities, "--densities")
    made = read_recipe(recipe)
    settings = _settings(max_new_tokens, batch, encoders, device)
    with _executor(executor, address, workers) as where, show_progress(err) as progress:
        found = sweep(made, questions, scales=grid, densities=wanted, settings=settings, executor=where, progress=progress)
    if plot is not None:
        _draw_curve(found, plot)
    if to is not None:
        write_recipe(recipe, to, found, with_density=bool(wanted))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_calibration(found)
        if to is not None:
            out.print(f"wrote {escape(str(to))}")


def _numbers(text: str | None, option: str) -> tuple[float, ...]:
    try:
        found = tuple(float(piece) for piece in text.split(",")) if text else ()
    except ValueError:
        raise RecipeError(f"{option}: expected numbers like 0.6,0.75,0.9, got {text!r}") from None
    if not all(number > 0 for number in found):
        raise RecipeError(f"{option}: expected numbers above 0, got {text!r}")
    return found


def _print_calibration(found: Calibration) -> None:
    out.print("agreement with the expert's own answers: probability (share of same answers), rebuilt | expanded")
    names = list(found.mask_scales)
    table = Table("density", "mask scale", *names, box=None, header_style="bold", pad_edge=False)
    by = {(point.density, point.mask_scale, point.expert): point for point in found.points}
    for density, scale in sorted({(point.density, point.mask_scale) for point in found.points}):
        cells = []
        for name in names:
            point = by[(density, scale, name)]
            text = f"{point.rebuilt.probability:.3f} ({point.rebuilt.same_answers:.0%}) | {point.expanded.probability:.3f} ({point.expanded.same_answers:.0%})"
            is_chosen = density == found.density and scale == found.mask_scales[name]
            cells.append(f"[green]{text}[/]" if is_chosen else text)
        table.add_row(f"{density:g}", f"{scale:g}", *cells)
    out.print(table)
    chosen = ", ".join(f"{name} {scale:g}" for name, scale in found.mask_scales.items())
    how = " (one for all agrees better than the best of each)" if found.is_shared else ""
    out.print(
        f"chosen: density {found.density:g}, mask scales {chosen}{how}, from {sum(found.num_prompts.values())} prompts without labels"
    )


def _draw_curve(found: Calibration, path: Path) -> None:
    from mmerge.pipeline.evaluation_report import open_figure

    figure, axes = open_figure(width=6, height=3.6)
    for name in found.mask_scales:
        own = sorted((p for p in found.points if p.expert == name and p.density == found.density), key=lambda p: p.mask_scale)
        xs = [point.mask_scale for point in own]
        (line,) = axes.plot(xs, [point.rebuilt.probability for point in own], marker="o", label=f"{name}, rebuilt")
        axes.plot(xs, [point.expanded.probability for point in own], "--", color=line.get_color(), label=f"{name}, expanded")
        axes.axvline(found.mask_scales[name], color=line.get_color(), linewidth=0.5)
    axes.set_xlabel("mask scale λ")
    axes.set_ylabel("probability of the expert's own answers")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
