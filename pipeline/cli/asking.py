"""What `mmerge evaluate` and `mmerge calibrate` share: options, questions and the executor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.options import EXECUTORS, check_choice

if TYPE_CHECKING:
    from mmerge.pipeline.evaluation.answer_tasks import Settings
    from mmerge.pipeline.evaluation.questions import Question
    from mmerge.pipeline.execution.executor import Executor

PromptsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help=(
            'questions: JSON lines {"question": "…", "image": "a.png", "answer": "…"}; may be'
            " repeated"
        ),
        show_default=False,
    ),
]
MediaOption = Annotated[
    Path | None,
    typer.Option(
        "--media",
        metavar="DIR",
        help="folder of the images, audio and videos [default: the folder of the question file]",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, or cuda: each task then requests a GPU")
]


def read_all_questions(
    prompts: Sequence[Path],
    *,
    media: Path | None,
    mcub: Sequence[Path] | None = None,
    answers: Path | None = None,
) -> list[Question]:
    """Return the questions of all files.

    Args:
        prompts: files of JSON lines.
        media: folder of the media files, each question file's own if None.
        mcub: files of MCUB as published; None for a command that does not take them.
        answers: MCUB's file of answers.

    Raises:
        RecipeError: no file was given, one cannot be read, or a media file is missing.
    """
    from mmerge.pipeline.evaluation.mcub import read_mcub
    from mmerge.pipeline.evaluation.questions import read_questions

    if not prompts and not mcub:
        alternative = "" if mcub is None else ", or --mcub"
        raise RecipeError(f"--prompts: give a file of questions{alternative}")
    if answers and not mcub:
        raise RecipeError("--answers: has no effect without --mcub. Leave it out")
    questions: list[Question] = []
    for path in prompts:
        questions += read_questions(path, media_root=media)
    for path in mcub or ():
        questions += read_mcub(path, answers=answers, media_root=media)
    for question in questions:
        _check_files(question)
    return questions


def _check_files(question: Question) -> None:
    for part in (*question.parts, *question.media):
        if part.kind != "text" and not Path(part.value).exists():
            raise RecipeError(
                f"question {question.id!r} of task {question.task!r}: {part.value}: no such file."
                " Name the folder of the media files with --media"
            )


def make_settings(
    *, max_new_tokens: int, batch: int, encoders: list[str] | None, device: str
) -> Settings:
    """Return how questions are asked. Raises RecipeError for an unknown device."""
    from mmerge.pipeline.evaluation.answer_tasks import Settings

    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", device):
        raise RecipeError(f"--device: expected 'cpu' or 'cuda', got {device!r}")
    return Settings(
        max_new_tokens=max_new_tokens,
        batch_size=batch,
        encoders=tuple(encoders or ()),
        device=device,
    )


@contextmanager
def opened_executor(name: str, *, address: str | None, workers: int | None) -> Iterator[Executor]:
    """Open the executor of that name while the context lasts. Raises RecipeError."""
    from mmerge.pipeline.execution.open import open_executor

    chosen = check_choice(name, EXECUTORS, option="--executor")
    executor = open_executor(chosen, address=address, num_workers=workers)
    try:
        yield executor
    finally:
        executor.close()
