"""What evaluate and calibrate have in common: options that say what is asked and where, and what is
made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.manifests.errors import RecipeError

if TYPE_CHECKING:
    from mmerge.pipeline.evaluation.evaluate import Settings
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
        help="folder of the media; the file's own if absent",
        show_default=False,
    ),
]
EncodersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoders",
        metavar="MODULE:FUNCTION",
        help="your own code that registers encoders; called in every process",
        show_default=False,
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="ray|serial",
        help="where models are asked: on Ray, or in this process",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="address of a Ray cluster; a local Ray is started without one",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="tasks at once on this machine; all cores if absent",
        show_default=False,
    ),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="prompts at once")]
TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu or cuda: each task then asks for a GPU")
]


def read_all(
    prompts: list[Path] | None,
    *,
    media: Path | None,
    mcub: list[Path] | None = None,
    answers: Path | None = None,
) -> list[Question]:
    """Return the questions of all files. Raises RecipeError: no file was given, one cannot be read,
    or a medium is not there.
    """
    from mmerge.pipeline.evaluation.questions import read_mcub, read_questions

    if not prompts and not mcub:
        raise RecipeError(
            "--prompts: give a file of questions" + ("" if mcub is None else ", or --mcub")
        )
    if answers and not mcub:
        raise RecipeError("--answers has no effect without --mcub: leave it out")
    found = [
        question for path in prompts or [] for question in read_questions(path, media_root=media)
    ]
    found += [
        question
        for path in mcub or []
        for question in read_mcub(path, answers=answers, media_root=media)
    ]
    for question in found:
        for part in (*question.parts, *question.media):
            if part.kind != "text" and not Path(part.value).exists():
                raise RecipeError(
                    f"question {question.id!r} of task {question.task!r}: {part.value}: no such"
                    " file. Name the folder of the media with --media"
                )
    return found


def make_settings(
    *, max_new_tokens: int, batch: int, encoders: list[str] | None, device: str
) -> Settings:
    """Return how questions are asked. Raises RecipeError for a device that there is not."""
    from mmerge.pipeline.evaluation.evaluate import Settings

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"--device: expected 'cpu' or 'cuda', got {device!r}")
    return Settings(
        max_new_tokens=max_new_tokens,
        batch_size=batch,
        encoders=tuple(encoders or ()),
        device=device,
    )


@contextmanager
def open_executor(name: str, *, address: str | None, workers: int | None) -> Iterator[Executor]:
    """Open the executor of that name, and close it again. Raises RecipeError for another name."""
    from mmerge.pipeline.execution import open as executors

    if name not in ("ray", "serial"):
        raise RecipeError(f"--executor: expected 'ray' or 'serial', got {name!r}")
    where = executors.open_executor(
        "serial" if name == "serial" else "ray", address=address, num_workers=workers
    )
    try:
        yield where
    finally:
        where.close()
