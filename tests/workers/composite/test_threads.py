"""Threads that share a composite get the answers about their own inputs, and no others."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_masks

from mmerge.pipeline import Composite, Part, load_composite

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"
IMAGES = sorted(SAMPLES.glob("image_*.png"))
HIDDEN = 32


@pytest.fixture(scope="module")
def composite(lab_store: str) -> Composite:
    return load_composite(f"{lab_store}#mmer")


@pytest.fixture(scope="module")
def feature_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_masks(tmp_path_factory.mktemp("threads"), "llama")


@contextmanager
def slow_forward(model: Any) -> Iterator[None]:
    """Make a model's passes last long enough for every other thread to arrive meanwhile."""
    forward = model.forward

    def sleep_first(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return forward(*args, **kwargs)

    model.forward = sleep_first
    try:
        yield
    finally:
        model.forward = forward


def ask_at_once(ask: Callable[[Any], Any], inputs: list[Any], *, num_rounds: int) -> list[Any]:
    """Return what `ask` returns for the inputs, in rounds, with as many threads as inputs."""
    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(ask, inputs * num_rounds))


def test_threads_get_the_embeddings_of_their_own_inputs(composite: Composite) -> None:
    encoder: Any = composite.encoders["image"]
    for embed in (
        lambda path: composite.embed([Part("image", path)])[0],
        lambda path: encoder.encode(Part("image", path)),
    ):
        expected = [embed(path) for path in IMAGES] * 3
        with slow_forward(encoder.model):
            returned = ask_at_once(embed, IMAGES, num_rounds=3)
        assert all(map(torch.equal, returned, expected))


def test_an_encoder_keeps_no_hook_on_its_model_between_inputs(composite: Composite) -> None:
    decoder = composite.encoders["image"].model.get_decoder()  # type: ignore[attr-defined]
    hooks = dict(decoder._forward_pre_hooks)
    composite.embed([Part("image", IMAGES[0])])
    assert decoder._forward_pre_hooks == hooks
    assert not hooks


def test_threads_get_the_answers_about_their_own_inputs(composite: Composite) -> None:
    end = composite.tokenizer.eos_token_id
    question = "which digit is in the image ?"

    def ask(path: Path) -> tuple[Any, ...]:
        prompt = composite.prompt(question, [Part("image", path)])
        return (
            composite.generate(prompt, max_new_tokens=3),
            "".join(composite.stream(prompt, max_new_tokens=3)).strip(),
            composite.generate_tokens([prompt], max_new_tokens=3),
            composite.score([prompt], [[end]]),
            composite.logits(prompt).tolist(),
        )

    expected = [ask(path) for path in IMAGES] * 2
    with slow_forward(composite.encoders["image"].model):  # type: ignore[attr-defined]
        assert ask_at_once(ask, IMAGES, num_rounds=2) == expected


def test_one_thread_at_a_time_is_between_the_inputs_of_a_prompt_and_its_answer(
    composite: Composite, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: list[int] = []
    encoder: Any = composite.encoders["image"]

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            owners.append(threading.get_ident())
            time.sleep(0.002)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(encoder.inputs, "make", note(encoder.inputs.make))
    monkeypatch.setattr(encoder.model, "forward", note(encoder.model.forward))
    monkeypatch.setattr(composite.language_model, "forward", note(composite.language_model.forward))
    prompts = [composite.prompt("what ?", [Part("image", path)]) for path in IMAGES]
    ask_at_once(
        lambda prompt: composite.generate(prompt, max_new_tokens=3, min_new_tokens=3),
        prompts,
        num_rounds=2,
    )
    changes = sum(owner != next_owner for owner, next_owner in itertools.pairwise(owners))
    assert len(owners) == 2 * len(IMAGES) * 5
    assert changes < 2 * len(IMAGES), "a thread came in between"


def test_a_pass_of_the_model_itself_is_not_routed_by_another_threads_prompt(
    feature_uri: str,
) -> None:
    composite = load_composite(feature_uri)
    model = composite.language_model
    image = Part("image", torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1)))
    text = torch.arange(3, 15)[None]

    def run_text(_: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=text, use_cache=False).logits
        return logits

    expected = run_text(0)
    with slow_forward(model), ThreadPoolExecutor(2) as pool:
        answers = pool.submit(
            lambda: [
                composite.generate([image], max_new_tokens=3, min_new_tokens=3) for _ in range(5)
            ]
        )
        passes = list(pool.map(run_text, range(15)))
        answers.result()
    assert all(logits.equal(expected) for logits in passes)


def test_a_pass_that_fails_gives_the_turn_back(feature_uri: str) -> None:
    composite = load_composite(feature_uri)
    for _ in range(3):
        with pytest.raises(IndexError):
            composite.language_model(input_ids=torch.tensor([[10_000]]))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(composite.generate, [Part.text("w5")], max_new_tokens=1)
        assert isinstance(answer.result(timeout=60), str)


def test_composites_that_sample_at_once_repeat_with_their_seeds(feature_uri: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
    composites = [load_composite(feature_uri) for _ in range(3)]

    def sample(number: int) -> str:
        return composites[number].generate([Part.text("w5 w6")], seed=number, **options)

    expected = [sample(number) for number in range(3)] * 6
    assert ask_at_once(sample, [0, 1, 2], num_rounds=6) == expected


def test_closing_a_stream_frees_the_turn_for_other_threads(feature_uri: str) -> None:
    composite = load_composite(feature_uri)
    expected = composite.generate([Part.text("w7")], max_new_tokens=3)
    stream = composite.stream([Part.text("w5")], max_new_tokens=100, min_new_tokens=100)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(composite.generate, [Part.text("w7")], max_new_tokens=3)
        stream.close()  # type: ignore[attr-defined]
        assert waiting.result(timeout=60) == expected
