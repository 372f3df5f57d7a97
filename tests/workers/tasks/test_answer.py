"""Answers and likelihoods of a composite, as tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmerge.manifests.errors import PromptError, RecipeError
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import Part, load_composite
from mmerge.workers.task import AnswerTask
from mmerge.workers.tasks.answer import (
    Answer,
    answer_prompts,
    answers_key,
    read_answers,
    register_from,
)

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"


@pytest.fixture(scope="module")
def composite(lab_store: str) -> Any:
    return load_composite(f"{lab_store}#mmer", dtype=torch.float32)


def prompts(composite: Any) -> list[Any]:
    return [
        composite.prompt(
            "which digit is in the image ?", [Part("image", str(SAMPLES / "image_seven_light.png"))]
        ),
        composite.prompt(
            "which digit is in the sound ?", [Part("audio", str(SAMPLES / "sound_three_low.wav"))]
        ),
    ]


def test_a_greedy_answer_scores_as_greedy_and_another_does_not(composite: Any) -> None:
    asked = prompts(composite)
    answers = composite.generate_tokens(asked, max_new_tokens=6)
    assert [
        composite.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers
    ] == composite.generate_batch(asked, max_new_tokens=6)
    scores = composite.score(asked, answers)
    assert [same for _, same in scores] == [True, True]
    wrong = [[(tokens[0] + 1) % 20, *tokens[1:]] for tokens in answers]
    assert [same for _, same in composite.score(asked, wrong)] == [False, False]


def test_a_score_is_the_mean_log_probability_of_one_prompt_by_itself(composite: Any) -> None:
    asked = prompts(composite)
    answers = [[5, 6, 7], [8]]
    found = composite.score(asked, answers)
    for parts, tokens, (likelihood, _) in zip(asked, answers, found, strict=True):
        logs = torch.log_softmax(composite.logits([*parts, Part("ids", tokens)]), dim=-1)
        places = range(len(logs) - len(tokens) - 1, len(logs) - 1)
        expected = [float(logs[place, token]) for place, token in zip(places, tokens, strict=True)]
        assert math.isclose(likelihood, sum(expected) / len(expected), rel_tol=1e-4)


def test_an_empty_answer_has_no_score(composite: Any) -> None:
    with pytest.raises(PromptError, match="at least one token"):
        composite.score(prompts(composite), [[1], []])


def test_a_finished_task_is_not_answered_again(
    lab_store: str, composite: Any, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path), create=True)
    task = AnswerTask(
        key="0" * 64,
        shard="m/0",
        model=f"{lab_store}#mmer",
        expert=None,
        prompts=tuple(tuple(p) for p in prompts(composite)),
        targets=None,
        max_new_tokens=4,
        batch_size=1,
        encoders=(),
        device="cpu",
        num_bytes=7,
        peak_bytes=7,
    )
    assert not answer_prompts(task, store).reused
    first = read_answers(store, task.key)
    assert all(isinstance(answer, Answer) for answer in first)
    assert answer_prompts(replace(task, model="nowhere#at-all"), store).reused
    store.put(answers_key("1" * 64), b'{"answers": [["a"')
    with pytest.raises(Exception, match="is damaged"):
        read_answers(store, "1" * 64)


@pytest.mark.parametrize("place", ["nowhere", "no.such.module:function", "json:no_such_function"])
def test_an_unknown_registration_is_named(place: str) -> None:
    with pytest.raises(RecipeError, match="--encoders"):
        register_from(place)
