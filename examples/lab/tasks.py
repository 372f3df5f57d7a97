"""Questions about digits that are seen, heard, filmed, scanned or only described in words.

Every prompt lists one to four sources and asks one question, for example::

    image : three in dark ink . sound : <the real sound> . question : which digit is in the sound ?
    answer :

A source is either described in words or given as the real thing. The base model learns from
prompts in which all sources are described; an expert from prompts in which its own source is
real; nobody learns from prompts with two real sources. The answer is one word, or a short phrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab import data

MODALITIES = ("image", "audio", "video", "point")
SOURCE_WORDS = {"image": "image", "audio": "sound", "video": "video", "point": "cloud"}
ATTRIBUTES = {
    "image": data.INKS,
    "audio": data.VOICES,
    "video": data.DIRECTIONS,
    "point": data.DEPTHS,
}
SINGLE_QUESTIONS = ("digit", "parity", "large", "next", "attribute", "count", "describe")
JOINT_QUESTIONS = ("same", "bigger")
SHARE = "share"
SHARE_OPTIONS = ("odd", "even", "large", "small")
BASE_QUESTIONS = (*SINGLE_QUESTIONS, *JOINT_QUESTIONS, SHARE)
# what the base learns first
CORE_QUESTIONS = ("digit", "parity", "large", *JOINT_QUESTIONS, SHARE)
# learned after the fact, each by one expert alone
NEW_QUESTIONS = {"image": "before", "audio": "rest"}

_ATTRIBUTE_NAMES = {"image": "ink", "audio": "voice", "video": "direction", "point": "depth"}
_DESCRIPTIONS = {
    "image": ("{digit} {attribute}", "{digit} in {attribute} ink"),
    "audio": ("{digit} {attribute}", "{digit} in a {attribute} voice"),
    "video": ("{digit} {attribute}", "{digit} moving {attribute}"),
    "point": ("{digit} {attribute}", "{digit} drawn {attribute}"),
}
_COUNTED = {"image": "loops", "audio": "phones", "video": "loops", "point": "loops"}
_FILLER = ("the", "weather", "is", "fine", "a", "boat", "sails", "over", "calm", "water", "today")


@dataclass(frozen=True)
class Part:
    """A piece of a prompt.

    `kind` is `text` (`value` a str), `image` (a PIL image), `audio` (float32 mono samples at
    `data.SAMPLE_RATE`), `video` (uint8 frames [frames, height, width, 3]) or `point` (float32
    points [points, 3]).
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Example:
    """A prompt, its one right answer and the name of its task, such as `image/parity`.

    `options` are the answers to choose from, where the task has a few that are always the same.
    """

    parts: tuple[Part, ...]
    answer: str
    task: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One source of a prompt: what it shows, and whether it is real or described in words."""

    modality: str
    digit: int
    attribute: str
    real: bool


@dataclass(frozen=True)
class Question:
    """A question about the sources of a prompt, up to `answer :`, and its right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """Sources, as texts and real sources not drawn yet, and questions to ask one at a time."""

    sources: tuple[str | Source, ...]
    questions: tuple[Question, ...]


def chance(task: str) -> float:
    """Return the accuracy of the best blind guess at a task.

    A task is named like `image/digit` or `image+audio/same`.
    """
    modalities, question = task.split("/")
    chosen = [m for m in modalities.split("+") if m in ATTRIBUTES] or list(MODALITIES)
    if question in ("digit", "next", "before", "rest"):
        return 0.1
    if question == SHARE:
        return 1 / len(SHARE_OPTIONS)
    if question == "count":
        counts = [[_count(m, digit) for digit in range(10)] for m in chosen]
        return float(
            np.mean([max(answers.count(count) for count in answers) / 10 for answers in counts])
        )
    if question in ("attribute", "describe"):
        digits = 10 if question == "describe" else 1
        return float(np.mean([1 / len(ATTRIBUTES[m]) / digits for m in chosen]))
    return 0.5


def vocabulary() -> list[str]:
    """Every word that occurs in a prompt or an answer, in a fixed order."""
    texts = [*data.DIGIT_WORDS, *SOURCE_WORDS.values(), ". : ? , question answer note"]
    for modality in MODALITIES:
        texts += [*ATTRIBUTES[modality], *_DESCRIPTIONS[modality]]
        texts += [ask for question in SINGLE_QUESTIONS for ask in _ask(question, modality, None)]
    texts += [ask for question in NEW_QUESTIONS.values() for ask in _ask(question, "image", None)]
    texts += [
        ask for question in (*JOINT_QUESTIONS, SHARE) for ask in _ask(question, "image", "audio")
    ]
    texts += ["odd even yes no", *SHARE_OPTIONS, *_FILLER]
    words = [word for text in texts for word in text.split() if "{" not in word]
    return list(dict.fromkeys(words))


def _ask(question: str, modality: str, second_modality: str | None) -> tuple[str, ...]:
    """The ways of asking a question about one source, or about two."""
    first = SOURCE_WORDS[modality]
    if question == "digit":
        return f"which digit is in the {first} ?", f"what is the digit of the {first} ?"
    if question == "parity":
        return (f"is the digit in the {first} odd or even ?",)
    if question == "large":
        return (f"is the digit in the {first} larger than four ?",)
    if question == "next":
        return (f"which digit comes after the digit in the {first} ?",)
    if question == "attribute":
        return (f"which {_ATTRIBUTE_NAMES[modality]} is in the {first} ?",)
    if question == "count":
        return (f"how many {_COUNTED[modality]} has the digit in the {first} ?",)
    if question == "describe":
        return (f"what does the {first} show ?",)
    if question == "before":
        return (f"which digit comes before the digit in the {first} ?",)
    if question == "rest":
        return (f"which digit makes nine with the digit in the {first} ?",)
    if question == SHARE:
        return ("what do all digits share ?",)
    second = SOURCE_WORDS[second_modality or modality]
    if question == "same":
        return (f"do the {first} and the {second} have the same digit ?",)
    return (f"which digit is larger , the {first} or the {second} ?",)


def _count(modality: str, digit: int) -> int:
    """The loops of a written digit, or the phones of a spoken one."""
    return data.NUM_PHONES[digit] if modality == "audio" else data.NUM_LOOPS[digit]


def _is(option: str, digit: int) -> bool:
    """Whether a digit is odd, even, large (larger than four) or small."""
    return {"odd": digit % 2 == 1, "even": digit % 2 == 0, "large": digit > 4, "small": digit <= 4}[
        option
    ]


def _answer(question: str, first: Source, second: Source | None) -> str:
    """The right answer to a question about one source or two."""
    if question == "digit":
        return data.DIGIT_WORDS[first.digit]
    if question == "parity":
        return "odd" if first.digit % 2 else "even"
    if question == "large":
        return "yes" if first.digit > 4 else "no"
    if question == "next":
        return data.DIGIT_WORDS[(first.digit + 1) % 10]
    if question == "before":
        return data.DIGIT_WORDS[(first.digit - 1) % 10]
    if question == "rest":
        return data.DIGIT_WORDS[9 - first.digit]
    if question == "attribute":
        return first.attribute
    if question == "count":
        return data.DIGIT_WORDS[_count(first.modality, first.digit)]
    if question == "describe":
        return _DESCRIPTIONS[first.modality][1].format(
            digit=data.DIGIT_WORDS[first.digit], attribute=first.attribute
        )
    assert second is not None
    if question == "same":
        return "yes" if first.digit == second.digit else "no"
    return SOURCE_WORDS[(first if first.digit > second.digit else second).modality]


def _describe(source: Source, rng: np.random.Generator) -> str:
    """A source in words."""
    ways = _DESCRIPTIONS[source.modality]
    return ways[rng.integers(len(ways))].format(
        digit=data.DIGIT_WORDS[source.digit], attribute=source.attribute
    )


def _make_question(kind: str, sources: Sequence[Source], rng: np.random.Generator) -> Question:
    """A question of a kind about any of the sources (joint kinds: about any two)."""
    order = [sources[index] for index in rng.permutation(len(sources))]
    if kind in ("attribute", "count", "describe"):  # of a real source, where there is one
        order.sort(key=lambda source: not source.real)
    first, second = order[0], None
    if kind == SHARE:
        (answer,) = (
            option
            for option in SHARE_OPTIONS
            if all(_is(option, source.digit) for source in sources)
        )
        return Question(kind, f"question : {_ask(kind, first.modality, None)[0]} answer :", answer)
    if kind in JOINT_QUESTIONS:
        equal = kind == "same" and rng.random() < 0.8
        pairs = [(a, b) for a in order for b in order if a is not b]
        fitting = [(a, b) for a, b in pairs if (a.digit == b.digit) == equal]
        if not fitting and kind == "bigger":
            kind = "same"
        first, second = (fitting or pairs)[0]
    asks = _ask(kind, first.modality, second.modality if second else None)
    text = f"question : {asks[rng.integers(len(asks))]} answer :"
    return Question(kind, text, _answer(kind, first, second))


def make_prompt(
    modalities: Sequence[str],
    real: Sequence[str],
    *,
    rng: np.random.Generator,
    kinds: Sequence[str],
    filler: bool = False,
) -> Prompt:
    """A random prompt with these sources, of which those in `real` are real.

    It has one question of each of the `kinds`. `filler` now and then puts a note of some
    meaningless words among the sources (used for training alone, so that the place of a source
    in the prompt varies).
    """
    digits = rng.integers(10, size=len(modalities))
    if SHARE in kinds:
        digits = _draw_sharing(len(modalities), rng)
    elif len(modalities) > 1:
        # two sources show the same digit in half of the prompts that ask about it
        first, second = rng.permutation(len(modalities))[:2]
        if "same" in kinds and rng.integers(2):
            digits[second] = digits[first]
        elif digits[first] == digits[second]:
            digits[second] = (digits[first] + rng.integers(1, 10)) % 10
    sources = []
    for modality, digit in zip(modalities, digits, strict=True):
        options = ATTRIBUTES[modality]
        attribute = options[rng.integers(len(options))]
        sources.append(Source(modality, int(digit), attribute, modality in real))

    pieces: list[str | Source] = []
    for index in rng.permutation(len(sources)):
        if filler and rng.random() < 0.12:
            words = [_FILLER[i] for i in rng.integers(len(_FILLER), size=rng.integers(1, 17))]
            pieces.append(f"note : {' '.join(words)} .")
        source = sources[index]
        pieces.append(f"{SOURCE_WORDS[source.modality]} :")
        pieces.append(source if source.real else _describe(source, rng))
        pieces.append(".")
    questions = tuple(_make_question(kind, sources, rng) for kind in kinds)
    return Prompt(_join_texts(pieces), questions)


def _draw_sharing(count: int, rng: np.random.Generator) -> np.ndarray:
    """Digits of which exactly one of SHARE_OPTIONS holds for all, each option as often."""
    shared = SHARE_OPTIONS[rng.integers(len(SHARE_OPTIONS))]
    fitting = np.array([digit for digit in range(10) if _is(shared, digit)])
    while True:
        digits = rng.choice(fitting, size=count)
        if sum(all(_is(option, int(digit)) for digit in digits) for option in SHARE_OPTIONS) == 1:
            return digits


def _join_texts(pieces: Sequence[str | Source]) -> tuple[str | Source, ...]:
    """Neighbouring texts joined by blanks."""
    joined: list[str | Source] = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]} {piece}"
        else:
            joined.append(piece)
    return tuple(joined)


def draw_source(source: Source, *, split: str, rng: np.random.Generator) -> Any:
    """The real image, sound, video or point cloud of a source."""
    draw = {
        "image": data.draw_image,
        "audio": data.draw_sound,
        "video": data.draw_video,
        "point": data.draw_cloud,
    }
    return draw[source.modality](source.digit, source.attribute, split=split, rng=rng)


def _to_example(prompt: Prompt, modality: str, split: str, rng: np.random.Generator) -> Example:
    """The prompt with its real sources drawn and its first question asked."""
    question = prompt.questions[0]
    parts = tuple(
        (
            Part("text", piece)
            if isinstance(piece, str)
            else Part(piece.modality, draw_source(piece, split=split, rng=rng))
        )
        for piece in _join_texts([*prompt.sources, question.text])
    )
    return Example(
        parts,
        question.answer,
        f"{modality}/{question.kind}",
        SHARE_OPTIONS if question.kind == SHARE else (),
    )


def _generator(split: str, seed: int, modalities: Sequence[str]) -> np.random.Generator:
    """A generator of random numbers of its own for each split, seed and set of modalities."""
    mark = sum(1 << ("text", *MODALITIES).index(modality) for modality in modalities)
    return np.random.default_rng([data.SPLITS.index(split), seed, mark])


def make_examples(
    modality: str, *, split: str, num_examples: int, seed: int, kinds: Sequence[str] = ()
) -> list[Example]:
    """Examples of one modality, the questions of these `kinds` in turn.

    For `image`, `audio`, `video` and `point` the source is real, and the only one; where two are
    compared, a source described in words stands beside it. For `text` there are one to four
    sources, all described in words. Without `kinds` all are asked that the base (for `text`) or the
    experts have learned from the beginning.
    """
    rng = _generator(split, seed, [modality])
    is_text = modality == "text"
    kinds = kinds or (BASE_QUESTIONS if is_text else SINGLE_QUESTIONS + JOINT_QUESTIONS)
    examples = []
    for index in range(num_examples):
        kind = kinds[index % len(kinds)]
        fewest = 2 if kind in (*JOINT_QUESTIONS, SHARE) else 1
        if is_text:
            modalities = rng.permutation(MODALITIES)[
                : rng.integers(fewest, len(MODALITIES) + 1)
            ].tolist()
        else:
            modalities = [
                modality,
                *rng.permutation([m for m in MODALITIES if m != modality])[: fewest - 1].tolist(),
            ]
        prompt = make_prompt(modalities, () if is_text else (modality,), rng=rng, kinds=[kind])
        examples.append(_to_example(prompt, modality, split, rng))
    return examples


def make_mixed_examples(
    modalities: Sequence[str],
    *,
    split: str,
    num_examples: int,
    seed: int,
    kinds: Sequence[str] = (),
) -> list[Example]:
    """Examples with two, three or four real sources, the questions of these `kinds` in turn.

    Single questions ask about any one of the sources, joint questions about two of them, and
    `share` about all; without `kinds` all single and joint ones are asked.
    """
    rng = _generator(split, seed, modalities)
    kinds = kinds or SINGLE_QUESTIONS + JOINT_QUESTIONS
    examples = []
    for index in range(num_examples):
        prompt = make_prompt(modalities, modalities, rng=rng, kinds=[kinds[index % len(kinds)]])
        examples.append(_to_example(prompt, "+".join(modalities), split, rng))
    return examples
