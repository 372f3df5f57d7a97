"""`mmerge evaluate`: scores of models on the same questions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.asking import (
    DeviceOption,
    MediaOption,
    PromptsOption,
    make_settings,
    opened_executor,
    read_all_questions,
)
from mmerge.pipeline.cli.options import (
    BatchOption,
    EncodersOption,
    ExecutorOption,
    JsonOption,
    RayAddressOption,
    TokensOption,
    WorkersOption,
)
from mmerge.pipeline.cli.output import err, out
from mmerge.pipeline.monitoring.printable import escape

if TYPE_CHECKING:
    from mmerge.pipeline.evaluation.models import Model
    from mmerge.pipeline.execution.executor import Executor
    from mmerge.pipeline.monitoring.progress import Progress


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL[,KEY=VALUE]…",
            help=(
                "composite STORE#NAME, with ',expert=image' to reconstruct one expert; or"
                " checkpoint FOLDER, with ',modality=image' if it has an encoder"
            ),
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="DIR",
            help="folder of the results; an interrupted evaluation continues there",
        ),
    ],
    prompts: PromptsOption = None,
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
        typer.Option(
            "--answers",
            metavar="FILE",
            help="with --mcub: its file of answers (MCUB-answer.json)",
            show_default=False,
        ),
    ] = None,
    media: MediaOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="URI",
            help="base LLM of the models that are checkpoints with an encoder",
            show_default=False,
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="NAME",
            help="model whose scores are the reference of performance retention",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: TokensOption = 64,
    batch: BatchOption = 16,
    encoders: EncodersOption = None,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "ray",
    address: RayAddressOption = None,
    workers: WorkersOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="ask again, even where the folder has an answer")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask models the same questions and score the answers.

    Metrics: exact match, multiple choice (also MCUB's), ROUGE-L for captions. Writes
    answers.parquet, scores.parquet, report.md and plots.
    """
    from mmerge.pipeline.evaluation.evaluate import check_original, summarise
    from mmerge.pipeline.evaluation.evaluate import evaluate as evaluate_models
    from mmerge.pipeline.evaluation.report import check_matplotlib, print_scores, write_report
    from mmerge.pipeline.monitoring.progress import show_progress

    choices = [ModelChoice.parse(text) for text in models]
    questions = read_all_questions(prompts or (), media=media, mcub=mcub or (), answers=answers)
    check_matplotlib()
    if to.exists() and not to.is_dir():
        raise RecipeError(f"--to: {to} is a file; give the folder of the results")
    settings = make_settings(
        max_new_tokens=max_new_tokens, batch=batch, encoders=encoders, device=device
    )
    store_uri = str((to / "store").absolute())
    with (
        opened_executor(executor, address=address, workers=workers) as task_executor,
        show_progress(err) as progress,
    ):
        opened = open_models(
            choices, base=base, store_uri=store_uri, executor=task_executor, progress=progress
        )
        if original is not None:
            check_original(original, [model.name for model in opened])
        rows = evaluate_models(
            opened,
            questions,
            out=store_uri,
            settings=settings,
            executor=task_executor,
            progress=progress,
            fresh=fresh,
        )
    scores = summarise(rows, original=original)
    written = write_report(to, rows, scores, original=original)
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    if scores:
        print_scores(scores, out)
    num_unscored = sum(not question.answers for question in questions)
    if num_unscored:
        out.print(
            f"{num_unscored} of {len(questions)} questions have no 'answer' to compare with: they"
            " were asked, but not scored"
        )
    out.print(f"wrote {escape(', '.join(str(path) for path in written))}")


@dataclass(frozen=True)
class ModelChoice:
    """A model as named on the command line."""

    text: str
    name: str
    uri: str
    expert: str | None
    modality: str | None

    @classmethod
    def parse(cls, text: str) -> ModelChoice:
        """Return the model that `[NAME=]URI[,expert=E][,modality=M]` stands for.

        Without NAME, the model is called after its URI and expert. Raises RecipeError.
        """
        head, *pieces = text.split(",")
        options: dict[str, str] = {}
        for piece in pieces:
            key, equals, value = piece.partition("=")
            if key not in ("expert", "modality") or not equals or not value:
                raise RecipeError(f"{text}: expected expert=NAME or modality=NAME, got {piece!r}")
            options[key] = value
        expert = options.get("expert")
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9 ._-]*)=(.+)", head)
        if match:
            name, uri = match[1], match[2]
        else:
            uri = head
            name = uri.rstrip("/").rpartition("#")[2].rpartition("/")[2]
            if expert is not None:
                name = f"{name}-{expert}"
        return cls(text, name, uri, expert, options.get("modality"))


def open_models(
    choices: Sequence[ModelChoice],
    *,
    base: str | None,
    store_uri: str,
    executor: Executor,
    progress: Progress,
) -> list[Model]:
    """Return the models; a checkpoint is first stored as a build of its own.

    Raises:
        RecipeError: two models have one name, or an option does not fit its model.
    """
    from mmerge.pipeline.evaluation.models import Model, is_checkpoint, open_checkpoint

    names = [choice.name for choice in choices]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise RecipeError(
            f"two models are called {repeated[0]!r}. Write NAME=MODEL to give them names"
        )
    models: list[Model] = []
    for choice in choices:
        if not is_checkpoint(choice.uri):
            if choice.modality is not None:
                raise RecipeError(
                    f"{choice.text}: 'modality' has no effect on a composite. To reconstruct one"
                    " expert, write expert=NAME"
                )
            models.append(Model.open(choice.name, choice.uri, expert=choice.expert))
            continue
        if choice.expert is not None:
            raise RecipeError(
                f"{choice.text}: 'expert' has no effect on a checkpoint. Write modality=image to"
                " say what its encoder reads"
            )
        model = open_checkpoint(
            choice.name,
            _to_absolute(choice.uri),
            base=None if base is None or choice.modality is None else _to_absolute(base),
            modality=choice.modality,
            store_uri=store_uri,
            executor=executor,
            progress=progress,
        )
        models.append(model)
    return models


def _to_absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())
