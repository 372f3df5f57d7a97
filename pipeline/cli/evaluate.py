"""The command that scores models."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli import questions as asking

if TYPE_CHECKING:
    from mmerge.pipeline.evaluation.evaluate import Model, TaskScore
    from mmerge.pipeline.execution.executor import Executor
    from mmerge.pipeline.monitoring.progress import Progress

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,expert=E]…",
            help=(
                "STORE#NAME, with ',expert=image' to rebuild one; or a checkpoint"
                " FOLDER,modality=image"
            ),
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="DIR",
            help="folder of the results; a run that was killed continues there",
        ),
    ],
    prompts: asking.PromptsOption = None,
    mcub: Annotated[
        list[Path] | None,
        typer.Option(
            "--mcub",
            metavar="FILE",
            help="MCUB's JSON as published; may be repeated",
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="MCUB-answer.json", show_default=False),
    ] = None,
    media: asking.MediaOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="base LLM of models that are ordinary multimodal checkpoints",
            show_default=False,
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="NAME",
            help="the model that performance retention compares with",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: asking.TokensOption = 64,
    batch: asking.BatchOption = 16,
    encoders: asking.EncodersOption = None,
    device: asking.DeviceOption = "cpu",
    executor: asking.ExecutorOption = "ray",
    address: asking.AddressOption = None,
    workers: asking.WorkersOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="ask everything again")] = False,
    as_json: asking.JsonOption = False,
) -> None:
    """Ask models the same questions and score them: exact match, multiple choice (MCUB too),
    captions by ROUGE-L.

    Writes answers.parquet, scores.parquet, report.md and plots.
    """
    from mmerge.pipeline.evaluation.evaluate import evaluate as ask
    from mmerge.pipeline.evaluation.evaluate import summarise
    from mmerge.pipeline.evaluation.report import check_matplotlib, write_report
    from mmerge.pipeline.monitoring.progress import show_progress

    asked = asking.read_all(prompts, media=media, mcub=mcub or [], answers=answers)
    check_matplotlib()
    if to.exists() and not to.is_dir():
        raise RecipeError(f"--to: {to} is a file; give the folder of the results")
    settings = asking.make_settings(
        max_new_tokens=max_new_tokens, batch=batch, encoders=encoders, device=device
    )
    with (
        asking.open_executor(executor, address=address, workers=workers) as where,
        show_progress(err) as progress,
    ):
        store = str((to / "store").absolute())
        opened = _open_models(models, base=base, store_uri=store, where=where, progress=progress)
        if original is not None and original not in [model.name for model in opened]:
            raise RecipeError(
                f"--original: there is no model {original!r}; there are"
                f" {', '.join(model.name for model in opened)}"
            )
        rows = ask(
            opened,
            asked,
            out=store,
            settings=settings,
            executor=where,
            progress=progress,
            fresh=fresh,
        )
    scores = summarise(rows, original=original)
    written = write_report(to, rows, scores, original=original)
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    if scores:
        _print_scores(scores)
    unscored = sum(not question.answers for question in asked)
    if unscored:
        out.print(
            f"{unscored} of {len(asked)} questions have no 'answer' to compare with: answered, not"
            " scored"
        )
    out.print(f"wrote {escape(', '.join(str(path) for path in written))}")


def _open_models(
    texts: list[str], *, base: str | None, store_uri: str, where: Executor, progress: Progress
) -> list[Model]:
    from mmerge.pipeline.evaluation.evaluate import Model, is_checkpoint, open_checkpoint

    found: list[Model] = []
    for text in texts:
        name, uri, options = _parse_model(text)
        if is_checkpoint(uri):
            if "expert" in options:
                raise RecipeError(
                    f"{text}: 'expert' has no effect on a checkpoint; say what its encoder reads:"
                    " modality=image"
                )
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
                raise RecipeError(
                    f"{text}: 'modality' has no effect on a composite; to rebuild one expert say"
                    " expert=NAME"
                )
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
    return (
        (name if match or "expert" not in options else f"{name}-{options['expert']}"),
        uri,
        options,
    )


def _print_scores(scores: list[TaskScore]) -> None:
    models = list(dict.fromkeys(score.model for score in scores))
    table = Table("task", "metric", box=None, header_style="bold", pad_edge=False)
    for model in models:
        table.add_column(model, justify="right")
    by = {(score.model, score.task): score for score in scores}
    for task in dict.fromkeys(score.task for score in scores):
        found = [by.get((model, task)) for model in models]
        cells = [
            (
                ""
                if each is None
                else f"{each.score:.1%}"
                + (
                    f" ({each.performance_retention:.1%})"
                    if each.performance_retention is not None
                    else ""
                )
            )
            for each in found
        ]
        table.add_row(task, next(each.metric for each in found if each), *cells)
    out.print(table)
