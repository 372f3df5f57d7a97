"""Held-out prompts by name and seed, and embeddings of their inputs.

Prompts hold keys in place of inputs; the experts' frozen encoders embed each input once.

Encoders are carried unchanged by every method, so each medium is encoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from lab import tasks

from mmerge.pipeline import Composite, Part
from mmerge.workers.modalities.encoders import EncoderRequest, register_encoder

SEEDS = (7, 8, 9)
VALIDATION_SEED = 3


@dataclass(frozen=True)
class Prompt:
    """A prompt whose media are keys, its right answer and its task."""

    parts: tuple[Part, ...]
    answer: str
    task: str


@dataclass(frozen=True)
class Sizes:
    """Prompts per set and seed."""

    single: int = 90
    mixed: int = 27
    share: int = 24
    new: int = 50
    many_single: int = 600
    """Per modality, where two choices are compared to within half a point."""
    many_mixed: int = 250


def mixes(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All pairs, triples and more of the modalities."""
    return [
        mix for count in range(2, len(modalities) + 1) for mix in combinations(modalities, count)
    ]


def set_names(modalities: Sequence[str]) -> dict[str, list[str]]:
    """The names of all sets by group."""
    combinations = mixes(modalities)
    return {
        "single": [f"single/{modality}" for modality in modalities],
        "text": ["single/text"],
        "mix": ["mix/" + "+".join(mix) for mix in combinations],
        "share": ["share/" + "+".join(mix) for mix in combinations if len(mix) > 2],
        "validation": [
            "validation/" + "+".join(who) for who in [*((m,) for m in modalities), *combinations]
        ],
        "many": [
            *(f"many single/{m}" for m in modalities),
            *("many mix/" + "+".join(mix) for mix in combinations),
        ],
        "new": [f"new/{modality}" for modality in tasks.NEW_QUESTIONS if modality in modalities],
    }


@cache
def _examples(name: str, seed: int, sizes: Sizes) -> tuple[Any, ...]:
    group, _, who = name.partition("/")
    split = "validation" if group == "validation" else "test"
    if group == "new":
        return tuple(
            tasks.make_examples(
                who,
                split=split,
                num_examples=sizes.new,
                seed=seed,
                kinds=(tasks.NEW_QUESTIONS[who],),
            )
        )
    if "+" not in who:
        count = sizes.many_single if group.startswith("many") else sizes.single
        return tuple(tasks.make_examples(who, split=split, num_examples=count, seed=seed))
    kinds = (tasks.SHARE,) if group == "share" else ()
    count = {"share": sizes.share, "many mix": sizes.many_mixed}.get(group, sizes.mixed)
    return tuple(
        tasks.make_mixed_examples(
            who.split("+"), split=split, num_examples=count, seed=seed, kinds=kinds
        )
    )


@cache
def load_set(name: str, seed: int, sizes: Sizes) -> tuple[Prompt, ...]:
    """The prompts of a set."""
    prompts = []
    for index, example in enumerate(_examples(name, seed, sizes)):
        parts = tuple(
            Part(part.kind, part.value if part.kind == "text" else f"{name}/{seed}/{index}/{place}")
            for place, part in enumerate(example.parts)
        )
        prompts.append(Prompt(parts, example.answer, example.task))
    return tuple(prompts)


def encode_sets(
    composite: Composite,
    names: Sequence[tuple[str, int]],
    sizes: Sizes,
    *,
    owners: Mapping[str, str],
    prepare: Callable[[str, Any], Any] = lambda kind, value: value,
) -> dict[tuple[str, str], torch.Tensor]:
    """What the composite's encoders make of all media of these sets, by expert and key.

    `owners` names the expert by modality; `prepare` makes of a medium what the encoder takes.
    """
    embeddings: dict[tuple[str, str], torch.Tensor] = {}
    for name, seed in names:
        for prompt, example in zip(
            load_set(name, seed, sizes), _examples(name, seed, sizes), strict=True
        ):
            for part, real in zip(prompt.parts, example.parts, strict=True):
                if part.kind in owners:
                    expert = owners[part.kind]
                    embeddings[(expert, part.value)] = (
                        composite.encoders[expert]
                        .encode(Part(part.kind, prepare(part.kind, real.value)))
                        .clone()
                    )
    return embeddings


class Lookup:
    """An encoder that knows what was encoded before."""

    def __init__(
        self, modality: str, expert: str, table: Mapping[tuple[str, str], torch.Tensor]
    ) -> None:
        self.modality, self._expert, self._table = modality, expert, table

    def encode(self, part: Part) -> torch.Tensor:
        """The embeddings of a medium, given by its key."""
        return self._table[(self._expert, part.value)]


def register_lookups(paths: Sequence[str]) -> None:
    """Register encoders that look inputs up in these files of embeddings.

    They apply to composite models that this process loads from now on.
    """
    table: dict[tuple[str, str], torch.Tensor] = {}
    for path in paths:
        table |= torch.load(path, weights_only=True, mmap=True)  # shared by all processes

    def make(modality: str) -> Callable[[EncoderRequest], Lookup]:
        return lambda request: Lookup(modality, request.expert, table)

    for modality in tasks.MODALITIES:
        register_encoder(modality, make(modality))
