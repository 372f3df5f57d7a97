"""Questions of MCUB (arXiv 2402.12750), from its JSON as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.evaluation.questions import (
    Question,
    check_unique,
    parse_strings,
    read_text,
    resolve_file,
)
from mmerge.workers.modalities.prompt import Part

MCUB_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions. USER: {text} ASSISTANT:"
)
"""The conversation (`vicuna_v1`) around every question in MCUB's official evaluation."""
MODALITIES = {"vision": "image", "audio": "audio", "video": "video", "point": "point"}
"""Keys of `modal_inputs`, and the modalities they stand for here."""
PLACES = {"vision": "<image>", "audio": "<audio>", "video": "<video>", "point": "<point>"}
"""Text that marks the place of one file of each kind in a question."""


def read_mcub(
    path: Path, *, answers: Path | None = None, media_root: Path | None = None
) -> list[Question]:
    """Return the questions of MCUB.

    The file is a list of records:

        {"id": …,
         "conversations": [{"from": "human", "value": "<image>\\n<audio>\\n… options"},
                           {"from": "gpt", "value": "B"}],
         "modal_inputs": {"vision": [files], "audio": [files], "video": [files], "point": [files]}}

    The right letter is the last turn, here or in a second
    file of the same form (`MCUB-answer.json`). Every place in a question takes the next file of its
    kind.

    Raises:
        RecipeError: a file is malformed, an answer is missing, or a media file lies outside its
            folder.
    """
    root = (media_root or path.parent).resolve()
    answer_rows = {str(row.get("id")): row for row in _read_rows(answers)} if answers else {}
    questions = [_parse_row(row, answer_rows, path=path, root=root) for row in _read_rows(path)]
    check_unique(questions, str(path))
    return questions


def _parse_row(
    row: dict[str, Any], answer_rows: dict[str, dict[str, Any]], *, path: Path, root: Path
) -> Question:
    where = f"{path}: {row.get('id')}"
    try:
        question_id = str(row["id"])
        turns = row["conversations"]
        text, files = turns[0]["value"], row.get("modal_inputs", {})
        letter = None
        if answer_rows or len(turns) > 1:
            letter = answer_rows.get(question_id, row)["conversations"][-1]["value"]
    except (KeyError, IndexError, TypeError) as error:
        raise RecipeError(f"{where}: is not in MCUB's format: {error!r} is missing") from error
    if not isinstance(letter, str) or not letter.strip():
        raise RecipeError(f"{where}: has no answer. Give the file of answers with --answers")
    if (
        not isinstance(text, str)
        or not isinstance(files, dict)
        or not files.keys() <= PLACES.keys()
    ):
        raise RecipeError(f"{where}: modal_inputs: expected some of {', '.join(PLACES)}")
    media = []
    for kind, names in files.items():
        for file in parse_strings(names, f"{where}: {kind}"):
            media.append(Part(MODALITIES[kind], resolve_file(root, file, where)))
    for kind, place in PLACES.items():
        text = text.replace(place, "{" + MODALITIES[kind] + "}")
    return Question(
        id=question_id,
        task=f"MCUB-{len({part.kind for part in media})}",
        text=text,
        media=tuple(media),
        answers=(letter.strip(),),
        metric="choice",
        template=MCUB_TEMPLATE,
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_text(path, where=str(path))
        rows = parse_json(text.encode(), what=str(path), max_bytes=limits.QUESTION_FILE_BYTES.value)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(
            f"{path}: expected a list of objects with id, conversations and modal_inputs"
        )
    return rows
