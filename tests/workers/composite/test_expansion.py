"""Expansion equals a naive loop over tokens, for every architecture, policy, batch, padding,
prefill and decode.
"""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EXPERTS, Naive, build_adapters, build_masks

from mmerge.manifests.errors import PromptError
from mmerge.pipeline import Composite, Part, load_composite
from mmerge.workers.composite.routed_linear import RoutedLinear
from mmerge.workers.composite.routing import TEXT

HIDDEN = 32
KINDS = {"masks": build_masks, "adapters": build_adapters}


def media(kind: str, num_tokens: int, seed: int) -> Part:
    return Part(
        kind, torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    )


PROMPTS = [
    [
        Part.text("w5 w6"),
        media("image", 5, 1),
        Part.text("w7"),
        media("audio", 3, 2),
        Part.text("w8 w9"),
        media("image", 2, 3),
        Part.text("w10"),
    ],
    [media("video", 4, 4), Part.text("w11 w12 w13")],
    [Part.text("w14 w15 w16 w17")],
    [media("audio", 6, 5), media("video", 1, 6), media("image", 1, 7)],
]


def pad_prompts(
    embedded: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a batch of prompts, each given by its embeddings and modality ids.

    Embeddings [batch, tokens, hidden], modality ids and attention mask, int64 [batch, tokens].
    """
    length = max(len(ids) for _, ids in embedded)
    first_embeds, first_ids = embedded[0]
    embeds = first_embeds.new_zeros(len(embedded), length, first_embeds.shape[-1])
    ids = torch.full((len(embedded), length), TEXT, dtype=torch.long, device=first_ids.device)
    mask = torch.zeros_like(ids)
    for row, (values, modality_ids) in enumerate(embedded):
        start = length - len(modality_ids)
        embeds[row, start:] = values
        ids[row, start:] = modality_ids
        mask[row, start:] = 1
    return embeds, ids, mask


class Family:
    """Composites and naive models of each architecture and kind, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, str], tuple[str, Naive]] = {}

    def find(self, architecture: str, kind: str) -> tuple[str, Naive]:
        key = (architecture, kind)
        if key not in self.made:
            place = self.folder / f"{architecture}-{kind}"
            place.mkdir()
            uri = KINDS[kind](place, architecture)
            self.made[key] = uri, Naive(uri, architecture)
        return self.made[key]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


EVEN_PROMPTS = [
    [Part("ids", [5, 6]), media("image", 5, 1), Part("ids", [7]), media("audio", 3, 2)],
    [media("video", 4, 4), Part("ids", [11, 12, 13, 14, 15, 16, 17])],
    [Part("ids", [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24])],
    [media("audio", 6, 5), Part("ids", [8]), media("video", 1, 6), media("image", 3, 7)],
]
"""All of eleven tokens: a batch of them has no padding."""

CASES = [
    (architecture, "masks", policy)
    for architecture in ARCHITECTURES
    for policy in ("packed", "resident")
]
CASES += [(architecture, "adapters", "packed") for architecture in ARCHITECTURES]
BATCHES = {
    "batch 1": (PROMPTS[:1], 0),
    "batch 1, padded": (PROMPTS[:1], 3),
    "batch 4": (EVEN_PROMPTS, 0),
    "batch 4, padded": (PROMPTS, 0),
    "batch 4, every row padded": (EVEN_PROMPTS, 2),
}
"""Prompts, and how many tokens of padding stand before the longest of them."""


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("architecture", "kind", "policy"), CASES)
def test_logits_of_prefill_and_of_every_decoded_token_equal_the_naive_loop(
    family: Family, architecture: str, kind: str, policy: Any, batch: str
) -> None:
    uri, naive = family.find(architecture, kind)
    composite = load_composite(uri, policy=policy)
    prompts, num_padding = BATCHES[batch]
    embeds, ids, mask = pad(composite, prompts, num_padding)
    assert bool((mask == 0).any()) == ("padded" in batch)
    with torch.inference_mode(), composite._routing.prefill(ids):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        prefilled = composite.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    for cache in ("dynamic", "static"):
        options = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        if cache == "static":
            options["cache_implementation"] = "static"
        with torch.inference_mode(), composite._routing.prefill(ids):
            made = composite.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
                **options,
            )
        for row in range(len(prompts)):
            is_own = mask[row] == 1
            expected = naive.logits(
                embeds[row, is_own], ids[row, is_own].tolist(), made.sequences[row].tolist()
            )
            num_tokens = int(is_own.sum())
            torch.testing.assert_close(
                prefilled[row, is_own], expected[:num_tokens], rtol=1e-5, atol=1e-5
            )
            found = torch.stack([step[row] for step in made.logits])
            torch.testing.assert_close(found, expected[num_tokens - 1 : -1], rtol=1e-5, atol=1e-5)


def pad(
    composite: Composite, prompts: Any, num_padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, modality ids and attention mask of a batch, the longest prompt with `num_padding`
    tokens of padding before it.
    """
    embedded = [composite.embed(prompt) for prompt in prompts]
    embeds, ids, mask = pad_prompts(embedded)
    grow = torch.nn.functional.pad
    return (
        grow(embeds, (0, 0, num_padding, 0)),
        grow(ids, (num_padding, 0), value=-1),
        grow(mask, (num_padding, 0)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_public_calls_give_what_the_naive_loop_gives(family: Family, kind: str) -> None:
    uri, naive = family.find("llama", kind)
    composite = load_composite(uri)
    answers = composite.generate_tokens(PROMPTS, max_new_tokens=4)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        embeds, ids = composite.embed(prompt)
        expected = naive.logits(embeds, ids.tolist(), answer)
        torch.testing.assert_close(
            composite.logits(prompt), expected[: len(ids)], rtol=1e-5, atol=1e-5
        )
        assert answer == expected[len(ids) - 1 : -1].argmax(-1).tolist()


def test_routing_matters_in_these_models(family: Family) -> None:
    uri, naive = family.find("qwen3", "masks")
    embeds, ids = load_composite(uri).embed(PROMPTS[0])
    routed = naive.logits(embeds, ids.tolist())
    assert (routed - naive.logits(embeds, [-1] * len(ids))).abs().max() > 0.01


def test_biases_of_every_modality_are_loaded(family: Family) -> None:
    composite = load_composite(family.find("qwen2", "masks")[0])
    module = composite.language_model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(module, RoutedLinear)
    assert module.bias is not None
    values = [module.bias.of(index) for index in range(-1, len(EXPERTS))]
    assert not any(values[0].equal(other) for other in values[1:])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}]
)
def test_beams_and_several_answers_route_every_row_of_the_prompt(
    family: Family, options: dict[str, Any]
) -> None:
    uri, naive = family.find("llama", "masks")
    composite = load_composite(uri)
    made = composite._generate(
        [composite.embed(prompt) for prompt in PROMPTS[:2]],
        max_new_tokens=1,
        min_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    count = options.get("num_beams") or options["num_return_sequences"]
    for row, prompt in enumerate((PROMPTS[0], PROMPTS[1])):
        embeds, ids = composite.embed(prompt)
        for each in range(count):
            torch.testing.assert_close(
                made.logits[0][row * count + each],
                naive.logits(embeds, ids.tolist())[-1],
                rtol=1e-5,
                atol=1e-5,
            )


def test_a_prompt_in_pieces_is_routed_as_in_one_pass(family: Family) -> None:
    uri, naive = family.find("mistral", "masks")
    composite = load_composite(uri)
    embeds, ids = composite.embed(PROMPTS[0])
    expected = naive.logits(embeds, ids.tolist())
    model = composite.language_model
    with torch.inference_mode(), composite._routing.prefill(ids[None]):
        first = model(inputs_embeds=embeds[None, :6], use_cache=True)
        second = model(inputs_embeds=embeds[None, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(
        torch.cat([first.logits[0], second.logits[0]]), expected, rtol=1e-5, atol=1e-5
    )


def test_sampling_repeats_with_a_seed_and_leaves_the_generator_alone(family: Family) -> None:
    composite = load_composite(family.find("llama", "masks")[0])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    answers = [composite.generate(PROMPTS[0], seed=seed, **options) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.get_rng_state().equal(before)


def test_a_stream_gives_the_answer_in_pieces_and_its_errors_to_the_reader(family: Family) -> None:
    composite = load_composite(family.find("llama", "masks")[0])
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6}
    pieces = list(composite.stream(PROMPTS[0], **options))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == composite.generate(PROMPTS[0], **options)
    with pytest.raises(PromptError, match="no expert for modality 'smell'"):
        list(composite.stream([Part("smell", "x")]))
    with pytest.raises(PromptError, match="the model takes 128 together"):
        list(composite.stream(PROMPTS[0], max_new_tokens=600))


def test_a_stream_that_is_left_ends_and_the_next_answer_is_right(family: Family) -> None:
    composite = load_composite(family.find("llama", "masks")[0])
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8}
    expected = composite.generate(PROMPTS[1], **options)
    passes = []
    composite.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(5):
        for _piece in composite.stream(PROMPTS[0], max_new_tokens=100, min_new_tokens=100):
            break
        assert composite.generate(PROMPTS[1], **options) == expected
    assert len(passes) < 5 * (100 + 8) * 0.8, "what nobody asks for is not generated"


def test_threads_may_ask_one_composite_and_copies_of_a_model_have_their_own_turns(
    family: Family,
) -> None:
    composite = load_composite(family.find("llama", "masks")[0])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = [composite.generate(prompt, **options) for prompt in PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: composite.generate(prompt, **options), PROMPTS * 5))
    assert found == expected * 5
    copied = copy.deepcopy(composite.language_model)
    routings = [
        next(each._routing for each in model.modules() if isinstance(each, RoutedLinear))
        for model in (composite.language_model, copied)
    ]
    with routings[0].prefill(torch.zeros(1, 1, dtype=torch.long)), ThreadPoolExecutor(1) as pool:
        assert (
            pool.submit(
                lambda: routings[1].prefill(torch.zeros(1, 1, dtype=torch.long)).__enter__()
            ).result(timeout=60)
            is None
        )


def test_what_cannot_be_generated_is_refused(family: Family) -> None:
    composite = load_composite(family.find("llama", "masks")[0])
    with pytest.raises(PromptError, match="no prompt was given"):
        composite.generate_batch([])
    with pytest.raises(PromptError, match="ask for at least one"):
        composite.generate(PROMPTS[0], max_new_tokens=0)
    with pytest.raises(PromptError, match=r"embeddings have width 7, the language model's have 32"):
        composite.generate([Part("image", torch.zeros(2, 7))])
    with pytest.raises(
        PromptError,
        match=r"the prompt has 201 tokens and 0 are to be generated; the model takes 128",
    ):
        composite.logits([media("image", 200, 1), Part.text("w5")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["packed", "resident"])
def test_a_gpu_gives_the_logits_of_the_naive_loop(family: Family, policy: Any) -> None:
    uri, naive = family.find("llama", "masks")
    composite = load_composite(uri, device="cuda", policy=policy)
    for prompt in PROMPTS:
        embeds, ids = composite.embed(prompt)
        torch.testing.assert_close(
            composite.logits(prompt).cpu(),
            naive.logits(embeds.cpu(), ids.tolist()),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_composite_that_is_dropped_gives_its_memory_back_at_once(
    family: Family, kind: str
) -> None:
    composite = load_composite(family.find("llama", kind)[0])
    composite.generate_tokens(PROMPTS, max_new_tokens=2)
    held = [weakref.ref(each) for each in composite.language_model.parameters()]
    gc.disable()  # a model that is part of a cycle would stay until Python looks for such
    try:
        del composite
        assert held
        assert not any(each() is not None for each in held)
    finally:
        gc.enable()
