"""Questions to evaluate on, from files of JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.regular_file import describe_os_error, read_regular_file
from mmerge.workers.modalities.prompt import Part, make_prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Metric = Literal["exact", "choice", "rouge"]

CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
"""The end of LLaVA-1.5's published prompts for multiple choice."""
_QUESTION_KEYS = {"id", "task", "question", "parts", "answer", "options", "metric", "letters"}
_EXAMPLE = '{"question": "…", "image": "a.png", "answer": "…"}'


@dataclass(frozen=True)
class Question:
    """One question.

    Either `parts` is the whole prompt, or the composite's templates combine `text` and `media`.
    """

    id: str
    task: str
    text: str = ""
    media: tuple[Part, ...] = ()
    parts: tuple[Part, ...] = ()
    answers: tuple[str, ...] = ()
    """Right answers; empty if unknown. With metric `choice` the first is the right option, or its
    letter.
    """
    options: tuple[str, ...] = ()
    metric: Metric = "exact"
    template: str | None = None
    """Prompt template of this question, used instead of the composite's."""

    def to_prompt(
        self, *, template: str | None, media_templates: Mapping[str, str]
    ) -> tuple[Part, ...]:
        """Return the parts of the prompt. Raises PromptError.

        Without any template the composite formats the question: its experts may have chat
        templates.
        """
        if self.parts:
            return self.parts
        if self.template is None and template is None and not media_templates:
            return (Part.question(self.text), *self.media)
        if self.template is not None and self.media:
            # The question's own template has the places of its media files.
            before, _, after = self.template.partition("{text}")
            text = before + self.text + after
            return tuple(make_prompt(text, self.media, template=None, media_templates={}))
        chosen_template = template if self.template is None else self.template
        return tuple(
            make_prompt(
                self.text, self.media, template=chosen_template, media_templates=media_templates
            )
        )


def read_questions(path: Path, *, media_root: Path | None = None) -> list[Question]:
    """Return the questions of a file of JSON lines.

    A line is an object with `question` and files by modality (`"image": "a.png"`, or a list), or
    with `parts`, a list of `{"text": "…"}`, `{"image": "a.png"}`, … that is the whole prompt.
    Optional keys: `id`, `task`, `answer` (a string, or a list of right ones), `options`, `letters`
    (true: list the options with letters and ask for a letter) and `metric` (exact, choice, rouge;
    by default `choice` with options, `rouge` with several answers, else `exact`).

    Args:
        path: the file.
        media_root: folder of the media files, by default the folder of `path`; files outside it are
            refused.

    Raises:
        RecipeError: the file cannot be read or a line is malformed; the message names the line.
    """
    root = (media_root or path.parent).resolve()
    questions: list[Question] = []
    # Not splitlines: strings of JSON may contain other line separators.
    for number, line in enumerate(read_text(path, where=str(path)).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                raw = parse_json(line.encode(), what="question")
            except ValueError as error:
                raise RecipeError(f"{where}: {error}") from error
            questions.append(_parse_line(raw, where=where, root=root, number=number))
    if not questions:
        raise RecipeError(f"{path}: has no questions")
    check_unique(questions, str(path))
    return questions


def read_text(path: Path, *, where: str, limit: limits.Limit = limits.QUESTION_FILE_BYTES) -> str:
    """Return the text of a UTF-8 file that a user names; `where` begins every error.

    Raises:
        RecipeError: it is no regular file, cannot be read, is no UTF-8, or exceeds the limit.
    """
    try:
        return read_regular_file(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: is not UTF-8 text ({error})") from error
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({describe_os_error(error)})") from error


def _parse_line(raw: Any, *, where: str, root: Path, number: int) -> Question:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected an object like {_EXAMPLE}")
    text, task = raw.get("question", ""), raw.get("task", "questions")
    if not isinstance(text, str) or not isinstance(task, str):
        raise RecipeError(f"{where}: question and task must be strings")
    answers = parse_strings(raw.get("answer", []), f"{where}: answer")
    options = parse_strings(raw.get("options") or [], f"{where}: options")
    metric = _choose_metric(raw.get("metric"), options, answers, where=where)
    files = {key: value for key, value in raw.items() if key not in _QUESTION_KEYS}
    parts: tuple[Part, ...] = ()
    if raw.get("parts") is not None:
        extra_keys = [key for key in ("question", "letters", *files) if raw.get(key)]
        if extra_keys:
            raise RecipeError(
                f"{where}: 'parts' is the whole prompt. Leave out {', '.join(extra_keys)}"
            )
        parts = _parse_parts(raw["parts"], where=where, root=root)
    elif raw.get("letters"):
        text, answers = _ask_for_letter(text, options, answers, where=where)
    media = _parse_files(files, where=where, root=root)
    if not text and not media and not parts:
        raise RecipeError(f"{where}: has neither a question nor a file")
    return Question(
        id=str(raw.get("id", number)),
        task=task,
        text=text,
        media=media,
        parts=parts,
        answers=answers,
        options=options,
        metric=metric,
    )


def _choose_metric(
    metric: Any, options: Sequence[str], answers: Sequence[str], *, where: str
) -> Metric:
    if not metric:
        if options:
            return "choice"
        return "rouge" if len(answers) > 1 else "exact"
    if metric not in get_args(Metric):
        expected = ", ".join(get_args(Metric))
        raise RecipeError(f"{where}: metric: expected {expected}, got {metric!r}")
    chosen: Metric = metric
    return chosen


def _parse_files(files: Mapping[str, Any], *, where: str, root: Path) -> tuple[Part, ...]:
    parts = []
    for kind, value in files.items():
        for file in parse_strings(value, f"{where}: {kind}"):
            parts.append(Part(kind, resolve_file(root, file, where)))
    return tuple(parts)


def parse_strings(value: Any, where: str) -> tuple[str, ...]:
    """Return a string, or a list of strings, as a tuple. Raises RecipeError."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise RecipeError(f"{where}: expected a string or a list of strings, got {value!r}")
    return tuple(values)


def _parse_parts(value: Any, *, where: str, root: Path) -> tuple[Part, ...]:
    expected = f'{where}: parts: expected a list like [{{"text": "…"}}, {{"image": "a.png"}}]'
    if not isinstance(value, list) or not value:
        raise RecipeError(expected)
    parts = []
    for item in value:
        if not isinstance(item, dict) or len(item) != 1:
            raise RecipeError(expected)
        [(kind, content)] = item.items()
        if not isinstance(content, str):
            raise RecipeError(f"{where}: parts: expected texts and file names, got {content!r}")
        parts.append(Part(kind, content if kind == "text" else resolve_file(root, content, where)))
    return tuple(parts)


def resolve_file(root: Path, file: str, where: str) -> str:
    """Return the path of a media file. Raises RecipeError for a file outside the media folder."""
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise RecipeError(
            f"{where}: {file} lies outside {root}. Name the folder of the media files with --media"
        )
    return str(path)


def list_options(options: Sequence[str]) -> str:
    """Return the options with letters, one per line, and the request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*lines, CHOICE_REQUEST])


def _ask_for_letter(
    question: str, options: tuple[str, ...], answers: tuple[str, ...], *, where: str
) -> tuple[str, tuple[str, ...]]:
    """Return the question with its options, and the letters of the right answers."""
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


def check_unique(questions: Sequence[Question], where: str) -> None:
    """Raise RecipeError if a task has an id twice."""
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if (question.task, question.id) in seen:
            raise RecipeError(f"{where}: task {question.task!r} has id {question.id!r} twice")
        seen.add((question.task, question.id))
