"""Prompts of `mmerge generate`: from options, or many from a file of JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.evaluation.questions import read_text
from mmerge.workers.modalities.prompt import Part


@dataclass(frozen=True)
class AskedPrompt:
    """A question with its files, and where it stands for messages."""

    question: str
    parts: list[Part]
    where: str = ""


_NOT_MEDIA = ("text", "ids")
"""Kinds of a prompt's parts that hold text."""


def make_parts(
    *, image: Sequence[Path], audio: Sequence[Path], video: Sequence[Path], media: Sequence[str]
) -> list[Part]:
    """Return the files of a prompt. Raises RecipeError for a malformed --media."""
    parts = [Part("image", path) for path in image]
    parts += [Part("audio", path) for path in audio]
    parts += [Part("video", path) for path in video]
    for pair in media:
        kind, equals, path = pair.partition("=")
        if not equals or not kind or not path:
            raise RecipeError(f"--media: expected KIND=FILE, got {pair!r}")
        _check_kind(kind, where="--media")
        parts.append(Part(kind, path))
    return parts


def read_prompts(path: Path) -> list[AskedPrompt]:
    """Return question and files of every line; relative paths start at the prompt file's folder.

    Raises:
        RecipeError: the file cannot be read, or a line is malformed; the message names the line.
    """
    prompts = []
    # Not splitlines: strings of JSON may contain other line separators.
    text = read_text(path, where=f"--prompts: {path}", limit=limits.PROMPT_FILE_BYTES)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"--prompts: {path}, line {number}"
            prompts.append(_parse_line(line, where=where, folder=path.parent))
    if not prompts:
        raise RecipeError(f"--prompts: {path} has no prompts")
    return prompts


def _parse_line(line: str, *, where: str, folder: Path) -> AskedPrompt:
    try:
        raw: Any = parse_json(line.encode(), what="prompt")
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("question", ""), str):
        raise RecipeError(
            f'{where}: expected an object like {{"question": "…", "image": ["a.png"]}}'
        )
    question: str = raw.pop("question", "")
    parts = []
    for kind, value in raw.items():
        _check_kind(kind, where=where)
        files = [value] if isinstance(value, str) else value
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise RecipeError(f"{where}: {kind}: expected a file or a list of files")
        parts += [Part(kind, folder / file) for file in files]
    if not question and not parts:
        raise RecipeError(f"{where}: has neither a question nor a file")
    return AskedPrompt(question, parts, where)


def _check_kind(kind: str, *, where: str) -> None:
    if kind in _NOT_MEDIA:
        raise RecipeError(f"{where}: {kind!r} is no modality. Put the text into the question")
