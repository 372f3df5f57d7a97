"""Prompts as lists of parts: text, images, audio, video and what other encoders take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.errors import PromptError
from mmerge.manifests.format.manifest import ExpertRecord

MEDIA_PLACE = "{media}"
TEXT_PLACE = "{text}"
QUESTION = "question"
"""Kind of the first part of a prompt that is not formatted yet."""


@dataclass(frozen=True)
class Part:
    """One part of a prompt.

    `kind` is `text`, a modality or the name of an expert. `value` is a str for text; for an image a
    path or a PIL image; for audio a path or a mono float array at `sampling_rate` (Hz); for video a
    path or uint8 frames [frames, height, width, 3].
    """

    kind: str
    value: Any
    sampling_rate: int | None = None
    placeholder: str | None = None
    """Text that stands for the input where a chat template wrote another than the encoder's."""

    @classmethod
    def question(cls, text: str) -> Part:
        """Return a question that the composite formats itself, with the inputs that follow it."""
        return cls(QUESTION, text)

    @classmethod
    def text(cls, text: str) -> Part:
        """Return a part of plain text."""
        return cls("text", text)


def check_text(text: object) -> None:
    """Check the text of a prompt before it is tokenised.

    Raises:
        PromptError: it is no text, no Unicode, or too long.
    """
    if not isinstance(text, str):
        raise PromptError(f"text was given as {type(text).__name__}; give a str")
    limits.PROMPT_CHARACTERS.check(len(text), where="the text", error=PromptError)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has {text[error.start]!r} at character {error.start + 1}: half of a"
            " surrogate pair, or a byte that is not UTF-8. Remove it"
        ) from error


def check_places(question: str, media: Sequence[Part], *, kinds: Collection[str]) -> None:
    """Check that a question has no more placeholders of a kind, such as `{image}`, than inputs.

    Raises:
        PromptError: it has more.
    """
    for kind in sorted(kinds):
        num_places = question.count("{" + kind + "}")
        num_inputs = sum(part.kind == kind for part in media)
        if num_places > num_inputs:
            raise PromptError(
                f"the question names {{{kind}}} {num_places} times, {num_inputs} such inputs were"
                " given: give one for each, or leave the place out"
            )


def find_media_templates(experts: Sequence[ExpertRecord]) -> dict[str, str]:
    """Return the templates of inputs by kind: an expert's name, or its modality.

    Of several experts of one modality the first reads its inputs, so its template counts.
    """
    by_modality = {record.modality: record.template for record in reversed(experts)}
    by_name = {record.name: record.template for record in experts}
    return {kind: text for kind, text in (by_modality | by_name).items() if text}


def make_prompt(
    question: str,
    media: Sequence[Part],
    *,
    template: str | None,
    media_templates: Mapping[str, str],
) -> list[Part]:
    """Return the parts of a prompt, formatted by templates.

    Args:
        question: the text. An input is put in the place of its placeholder `{image}`, `{audio}`, …
            if the question has one, without templates.
        media: the parts that are not text, in their order.
        template: text with the placeholders `{media}` and `{text}`; the media come first if absent.
        media_templates: per kind, text with the placeholder `{media}` for each input.

    Raises:
        PromptError: the question has placeholders for some inputs and not for others.
    """
    if any("{" + part.kind + "}" in question for part in media):
        return _place_media(question, media)
    return arrange(
        [*media, Part.text(question)], template=template, media_templates=media_templates
    )


def arrange(
    content: Sequence[Part], *, template: str | None, media_templates: Mapping[str, str]
) -> list[Part]:
    """Return the parts of a prompt from those of a message, whose text is taken as it is.

    Inputs before or behind all text are put where the template has them. Inputs between texts stay
    there, without templates. Templates as of `make_prompt`.
    """
    parts: list[Part] = []
    content = _join_texts(content)
    media = [part for part in content if part.kind != "text"]
    texts = [part.value for part in content if part.kind == "text"]
    if len(texts) > 1:
        return content
    question = "".join(texts)
    before, _, after = (template or f"{MEDIA_PLACE}{TEXT_PLACE}").partition(TEXT_PLACE)
    head, _, between = before.partition(MEDIA_PLACE)
    parts.append(Part.text(head))
    for part in media:
        left, _, right = media_templates.get(part.kind, MEDIA_PLACE).partition(MEDIA_PLACE)
        parts += [Part.text(left), part, Part.text(right)]
    parts.append(Part.text(between + question + after))
    return _join_texts(parts)


def _place_media(question: str, media: Sequence[Part]) -> list[Part]:
    """Return the parts of a question whose placeholders are replaced by inputs, in text order."""
    parts: list[Part] = []
    text = question
    remaining = list(media)
    while remaining:
        offsets = [text.find("{" + part.kind + "}") for part in remaining]
        placed = [(offset, index) for index, offset in enumerate(offsets) if offset >= 0]
        if not placed:
            raise PromptError(
                f"the question has no place for {remaining[0].kind!r}: name every input as"
                f" {{{remaining[0].kind}}}, or none"
            )
        offset, index = min(placed)
        part = remaining.pop(index)
        parts += [Part.text(text[:offset]), part]
        text = text[offset + len(part.kind) + 2 :]
    return _join_texts([*parts, Part.text(text)])


def _join_texts(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with adjacent texts joined, without empty ones."""
    joined: list[Part] = []
    for part in parts:
        if part.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Part.text(joined[-1].value + part.value)
        else:
            joined.append(part)
    return [part for part in joined if part.kind != "text" or part.value]
