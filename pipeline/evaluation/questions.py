"""Questions to evaluate on: JSON lines of a user's own, or MCUB as it was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import RecipeError
from mmerge.workers.modalities.prompt import Part, make_prompt

MAX_QUESTIONS_BYTES = 1 << 30
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Metric = Literal["exact", "choice", "rouge"]

CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
"""What LLaVA-1.5's published prompts for multiple choice end with."""
MCUB_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions. USER: {text} ASSISTANT:"
)
"""The conversation (`vicuna_v1`) in which the official evaluation puts every MCUB question."""
MCUB_PLACES = {"vision": "<image>", "audio": "<audio>", "video": "<video>", "point": "<point>"}
"""Keys of `modal_inputs` in MCUB, and the text that stands for one medium of each in a question."""
_MCUB_MODALITIES = {"vision": "image", "audio": "audio", "video": "video", "point": "point"}
_KEYS = {"id", "task", "question", "parts", "answer", "options", "metric", "letters"}


@dataclass(frozen=True)
class Question:
    """One question. Either `parts` is the whole prompt, or `text` and `media` are put together as
    the composite's templates say.
    """

    id: str
    task: str
    text: str = ""
    media: tuple[Part, ...] = ()
    parts: tuple[Part, ...] = ()
    answers: tuple[str, ...] = ()
    """Right answers; empty where none is known. Of `choice` the first is the right option, or its
    letter.
    """
    options: tuple[str, ...] = ()
    metric: Metric = "exact"
    template: str | None = field(default=None)
    """Instead of the composite's."""

    def to_prompt(
        self, *, template: str | None, media_templates: Mapping[str, str]
    ) -> tuple[Part, ...]:
        """Return the parts of the prompt. Raises PromptError."""
        if self.parts:
            return self.parts
        own = template if self.template is None else self.template
        if self.template is not None and self.media:
            before, _, after = own.partition("{text}")  # type: ignore[union-attr]
            return tuple(
                make_prompt(
                    before + self.text + after, self.media, template=None, media_templates={}
                )
            )
        return tuple(
            make_prompt(self.text, self.media, template=own, media_templates=media_templates)
        )


def read_questions(path: Path, *, media_root: Path | None = None) -> list[Question]:
    """Return the questions of a file of JSON lines.

    A line is an object with `question` and media by modality (`"image": "a.png"`, or a list), or
    with `parts`, a list of `{"text": "…"}`, `{"image": "a.png"}`, … that is the whole prompt;
    further `id`, `task`, `answer` (a text, or a list of right ones), `options`, `letters` (true:
    list the options with letters and ask for one) and `metric` (exact, choice, rouge). Without a
    metric it is `choice` where there are options, `rouge` where there are several answers, else
    `exact`.

    Args:
        path: the file.
        media_root: the folder that media are in, the file's own if absent; none outside it is read.

    Raises:
        RecipeError: the file cannot be read, or a line is not such an object; names the line.
    """
    root = (media_root or path.parent).resolve()
    questions: list[Question] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                raw = parse_json(line.encode(), what="question")
            except ValueError as error:
                raise RecipeError(f"{where}: {error}") from error
            questions.append(_parse_line(raw, where=where, root=root, number=number))
    if not questions:
        raise RecipeError(f"{path}: has no questions")
    _refuse_repeats(questions, str(path))
    return questions


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_QUESTIONS_BYTES:
            raise RecipeError(f"{path}: has more than {MAX_QUESTIONS_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error


def _parse_line(raw: Any, *, where: str, root: Path, number: int) -> Question:
    if not isinstance(raw, dict):
        raise RecipeError(
            f'{where}: expected an object like {{"question": "…", "image": "a.png", "answer": "…"}}'
        )
    identity, task = str(raw.get("id", number)), raw.get("task", "questions")
    question, parts = raw.get("question", ""), raw.get("parts")
    if not isinstance(question, str) or not isinstance(task, str):
        raise RecipeError(f"{where}: question and task are texts")
    answers, options = (
        _texts(raw.get("answer", []), f"{where}: answer"),
        _texts(raw.get("options") or [], f"{where}: options"),
    )
    metric: Any = raw.get("metric") or (
        "choice" if options else "rouge" if len(answers) > 1 else "exact"
    )
    if metric not in get_args(Metric):
        raise RecipeError(
            f"{where}: metric: expected {', '.join(get_args(Metric))}, got {metric!r}"
        )
    media = {key: value for key, value in raw.items() if key not in _KEYS}
    if parts is not None:
        if question or media or raw.get("letters"):
            raise RecipeError(
                f"{where}: 'parts' is the whole prompt: leave out"
                f" {'question' if question else next(iter(media), 'letters')}"
            )
        return Question(
            identity,
            task,
            parts=_parse_parts(parts, where=where, root=root),
            answers=answers,
            options=options,
            metric=metric,
        )
    if raw.get("letters"):
        question, answers = _ask_for_letter(question, options, answers, where=where)
    found = tuple(
        Part(kind, _inside(root, file, where))
        for kind, files in media.items()
        for file in _texts(files, f"{where}: {kind}")
    )
    if not question and not found:
        raise RecipeError(f"{where}: has neither a question nor a medium")
    return Question(
        identity, task, text=question, media=found, answers=answers, options=options, metric=metric
    )


def _texts(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise RecipeError(f"{where}: expected a text, or a list of texts, got {value!r}")
    return tuple(values)


def _parse_parts(parts: Any, *, where: str, root: Path) -> tuple[Part, ...]:
    if (
        not isinstance(parts, list)
        or not parts
        or not all(isinstance(p, dict) and len(p) == 1 for p in parts)
    ):
        raise RecipeError(
            f'{where}: parts: expected a list like [{{"text": "…"}}, {{"image": "a.png"}}]'
        )
    pairs = [(kind, value) for part in parts for kind, value in part.items()]
    if not all(isinstance(value, str) for _, value in pairs):
        raise RecipeError(f"{where}: parts: expected texts and file names")
    return tuple(
        Part(kind, value if kind == "text" else _inside(root, value, where))
        for kind, value in pairs
    )


def _inside(root: Path, file: str, where: str) -> str:
    """Return the path of a medium. A file of questions names nothing outside its folder."""
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise RecipeError(
            f"{where}: {file} lies outside {root}. Name the folder of the media with --media"
        )
    return str(path)


def list_options(options: Sequence[str]) -> str:
    """Return options one a line with a letter before each, and the request for a letter."""
    return "\n".join(
        [
            *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)),
            CHOICE_REQUEST,
        ]
    )


def _ask_for_letter(
    question: str, options: tuple[str, ...], answers: tuple[str, ...], *, where: str
) -> tuple[str, tuple[str, ...]]:
    if not 2 <= len(options) <= len(LETTERS):
        raise RecipeError(
            f"{where}: letters: needs 2 to {len(LETTERS)} options, got {len(options)}"
        )
    letters = tuple(
        LETTERS[options.index(answer)] if answer in options else answer for answer in answers
    )
    if not all(letter in LETTERS[: len(options)] for letter in letters):
        raise RecipeError(f"{where}: answer: {answers[0]!r} is none of the options")
    return f"{question}\n{list_options(options)}", letters


def _refuse_repeats(questions: Sequence[Question], where: str) -> None:
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if (question.task, question.id) in seen:
            raise RecipeError(f"{where}: id {question.id!r} stands twice in task {question.task!r}")
        seen.add((question.task, question.id))


def read_mcub(
    path: Path, *, answers: Path | None = None, media_root: Path | None = None
) -> list[Question]:
    """Return the questions of MCUB (arXiv 2402.12750) from its JSON as published.

    A list of `{"id", "conversations": [{"from": "human", "value": "<image>\\n<audio>\\n… options"},
    {"from": "gpt", "value": "B"}], "modal_inputs": {"vision": [files], "audio": [files], "video":
    [files], "point": [files]}}`. The right letters stand in the last turn, or in a second file of
    the same form (`MCUB-answer.json`). A media place in a question takes the next file of its kind.

    Raises:
        RecipeError: a file is not of this form, an answer is missing, or a medium lies outside its
            folder.
    """
    root = (media_root or path.parent).resolve()
    known = {str(row.get("id")): row for row in _read_rows(answers)} if answers else {}
    questions = []
    for row in _read_rows(path):
        where = f"{path}: {row.get('id')}"
        try:
            text, files = row["conversations"][0]["value"], row.get("modal_inputs", {})
            right = (
                known.get(str(row["id"]), row)["conversations"][-1]["value"]
                if known or len(row["conversations"]) > 1
                else None
            )
        except (KeyError, IndexError, TypeError) as error:
            raise RecipeError(
                f"{where}: is not in the form of MCUB: {error!r} is missing"
            ) from error
        if not isinstance(right, str) or not right.strip():
            raise RecipeError(f"{where}: has no answer. Give the file of answers with --answers")
        if (
            not isinstance(text, str)
            or not isinstance(files, dict)
            or not files.keys() <= MCUB_PLACES.keys()
        ):
            raise RecipeError(f"{where}: modal_inputs: expected some of {', '.join(MCUB_PLACES)}")
        media = tuple(
            Part(_MCUB_MODALITIES[kind], _inside(root, file, where))
            for kind, listed in files.items()
            for file in _texts(listed, f"{where}: {kind}")
        )
        for kind, place in MCUB_PLACES.items():
            text = text.replace(place, "{" + _MCUB_MODALITIES[kind] + "}")
        name = f"MCUB-{len({part.kind for part in media})}"
        questions.append(
            Question(
                str(row["id"]),
                name,
                text=text,
                media=media,
                answers=(right.strip(),),
                metric="choice",
                template=MCUB_TEMPLATE,
            )
        )
    _refuse_repeats(questions, str(path))
    return questions


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = parse_json(_read_text(path).encode(), what=str(path), max_bytes=MAX_QUESTIONS_BYTES)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(
            f"{path}: expected a list of objects with id, conversations and modal_inputs"
        )
    return rows
