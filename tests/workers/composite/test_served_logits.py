"""Every class that composites serve answers as its own class does, for text and for an input.

The inputs are tensors made by hand, because several processors need packages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import Part, export, load_composite, make_plan, read_recipe, run
from mmerge.workers.composite.served_models import COMPARED
from mmerge.workers.modalities import processor_inputs
from tests.architectures import write_tokenizer
from tests.model_configs import MULTIMODAL
from tests.model_families import give_language_model, make_base, make_multimodal, tune

QUESTION, END = [5, 9, 17, 30], [21, 7, 33]
"""Token ids before and behind the input."""
NUM_NEW = 4
"""Tokens of an answer."""


@dataclass(frozen=True)
class HandMade:
    """Tensors of one input, and the ids of the placeholders that it replaces."""

    family: str
    token: int
    num_tokens: int
    make: Callable[[], dict[str, torch.Tensor]]
    modality: str = "image"
    types: tuple[str, int] | None = None
    """Argument with a number per token, and that of the placeholder; 0 is text."""
    wrapping: tuple[int, ...] = ()
    """Ids in front of and behind the placeholders, which belong to the input."""

    @property
    def ids(self) -> list[int]:
        """Ids of the tokens of the input."""
        first, last = self.wrapping[:1], self.wrapping[1:]
        return [*first, *[self.token] * self.num_tokens, *last]

    def to_arguments(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """Return the arguments of the class for a prompt of these ids."""
        tokens = torch.tensor([ids])
        arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.types:
            name, number = self.types
            arguments[name] = (tokens == self.token) * number
        return arguments


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def image_of(height: int, width: int) -> dict[str, torch.Tensor]:
    return {"image_sizes": torch.tensor([[height, width]])}


def sound(length: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": pixels(1, 16, length),
        "input_features_mask": torch.ones(1, length, dtype=torch.long),
    }


def patches(name: str, frames: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Pixels of a grid of patches, as the processors of Qwen-VL order them."""
    grid = torch.tensor([[frames, height, width]])
    values = "pixel_values_videos" if name == "video" else "pixel_values"
    return {values: pixels(int(grid.prod()), 96), f"{name}_grid_thw": grid}


IMAGE, VIDEO = ("mm_token_type_ids", 1), ("mm_token_type_ids", 2)
WIDE = 8, 12
"""Patches of an image; four of them become one token."""


def grid_image(family: str, **values: Any) -> HandMade:
    return HandMade(family, 114, 24, lambda: patches("image", 1, *WIDE), **values)


CASES = {
    "Qwen2-VL": grid_image("Qwen2-VL", types=IMAGE),
    # More frames than rows or columns: the text behind continues below the last frame's position.
    "Qwen2-VL, video": HandMade(
        "Qwen2-VL", 115, 24, lambda: patches("video", 6, 4, 4), "video", VIDEO
    ),
    "Qwen2.5-VL": grid_image("Qwen2.5-VL", types=IMAGE),
    "Qwen2.5-VL, video": HandMade(
        "Qwen2.5-VL", 115, 24, lambda: patches("video", 6, 4, 4), "video", VIDEO
    ),
    "Qwen3-VL": grid_image("Qwen3-VL", types=IMAGE),
    "Qwen3-VL-MoE": grid_image("Qwen3-VL-MoE", types=IMAGE),
    "Qwen3.5": grid_image("Qwen3.5", types=IMAGE),
    "GLM-4V": grid_image("GLM-4V", types=IMAGE),
    "Qwen2.5-Omni, image": grid_image("Qwen2.5-Omni thinker", wrapping=(112, 113)),
    "Qwen2.5-Omni, audio": HandMade(
        "Qwen2.5-Omni thinker",
        116,
        10,
        lambda: {
            "input_features": pixels(1, 16, 40),
            "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
        },
        "audio",
        wrapping=(117, 118),
    ),
    "Qwen3-Omni, image": grid_image("Qwen3-Omni thinker", wrapping=(112, 113)),
    "Gemma 3": HandMade(
        "Gemma 3",
        112,
        4,
        lambda: {"pixel_values": pixels(1, 3, 32, 32)},
        types=("token_type_ids", 1),
        wrapping=(101, 102),
    ),
    "PaliGemma": HandMade(
        "PaliGemma",
        112,
        16,
        lambda: {"pixel_values": pixels(1, 3, 32, 32)},
        types=("token_type_ids", 0),
    ),
    "PaliGemma 2": HandMade(
        "PaliGemma 2",
        112,
        16,
        lambda: {"pixel_values": pixels(1, 3, 32, 32)},
        types=("token_type_ids", 0),
    ),
    "Aya Vision": HandMade("Aya Vision", 115, 4, lambda: {"pixel_values": pixels(1, 3, 32, 32)}),
    "Granite Speech": HandMade(
        "Granite Speech", 112, 6, lambda: {"input_features": pixels(1, 30, 160)}, "audio"
    ),
    "Llama 4": HandMade("Llama 4", 112, 4, lambda: {"pixel_values": pixels(1, 3, 32, 32)}),
    "LLaVA 1.5": HandMade("LLaVA 1.5", 112, 16, lambda: {"pixel_values": pixels(1, 3, 32, 32)}),
    "Pixtral": HandMade(
        "Pixtral", 112, 32, lambda: {"pixel_values": pixels(1, 3, 64, 64), **image_of(32, 64)}
    ),
    "LLaVA-NeXT": HandMade(
        "LLaVA-NeXT",
        112,
        52,
        lambda: {"pixel_values": pixels(1, 3, 3, 32, 32), **image_of(30, 60)},
    ),
    "LLaVA-OneVision": HandMade(
        "LLaVA-OneVision",
        112,
        52,
        lambda: {"pixel_values": pixels(1, 3, 3, 32, 32), **image_of(30, 60)},
    ),
    "LLaVA-OneVision, video": HandMade(
        "LLaVA-OneVision",
        113,
        13,
        lambda: {"pixel_values_videos": pixels(1, 3, 3, 32, 32)},
        "video",
    ),
    "LLaVA-NeXT-Video": HandMade(
        "LLaVA-NeXT-Video",
        113,
        12,
        lambda: {"pixel_values_videos": pixels(1, 3, 3, 32, 32)},
        "video",
    ),
    "LLaVA-NeXT-Video, image": HandMade(
        "LLaVA-NeXT-Video",
        112,
        52,
        lambda: {"pixel_values": pixels(1, 3, 3, 32, 32), **image_of(30, 60)},
    ),
    "Video-LLaVA": HandMade(
        "Video-LLaVA",
        113,
        136,
        lambda: {"pixel_values_videos": pixels(1, 8, 3, 32, 32)},
        "video",
    ),
    "Qwen2-Audio": HandMade(
        "Qwen2-Audio",
        112,
        50,
        lambda: {
            "input_features": pixels(1, 16, 200),
            "feature_attention_mask": torch.ones(1, 200, dtype=torch.long),
        },
        "audio",
    ),
    "Audio Flamingo 3": HandMade("Audio Flamingo 3", 112, 50, lambda: sound(200), "audio"),
    "Voxtral": HandMade(
        "Voxtral", 112, 25, lambda: {"input_features": pixels(1, 16, 200)}, "audio"
    ),
    "InternVL": HandMade("InternVL", 114, 4, lambda: {"pixel_values": pixels(1, 3, 32, 32)}),
    "Idefics3": HandMade("Idefics3", 112, 8, lambda: {"pixel_values": pixels(1, 2, 3, 32, 32)}),
    "SmolVLM": HandMade("SmolVLM", 112, 8, lambda: {"pixel_values": pixels(1, 2, 3, 32, 32)}),
    "Mistral 3": HandMade(
        "Mistral 3", 112, 8, lambda: {"pixel_values": pixels(1, 3, 64, 64), **image_of(32, 64)}
    ),
    "DeepSeek-VL": HandMade("DeepSeek-VL", 112, 16, lambda: {"pixel_values": pixels(1, 3, 32, 32)}),
}


ONLY_OVER_PLAIN = {
    "Qwen3-Omni, image": "fused with others in memory",
    "Qwen3-VL-MoE": "fused with others in memory",
}
"""Cases of which no base of the same class is loaded, and the reason."""


class Inputs:
    """Stands in for an expert's processor."""

    def __init__(self, case: HandMade) -> None:
        self.case = case

    def find_placeholder(self, modality: str, *, owner: str) -> str:
        return "placeholder"

    def make(self, placeholder: str, modality: str, part: Part) -> Mapping[str, Any]:
        arguments = self.case.to_arguments(self.case.ids)
        if self.case.family.startswith("PaliGemma"):
            arguments["labels"] = torch.full_like(arguments["input_ids"], -100)  # as its processor
        return arguments | self.case.make()

    def without_frame(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(input_ids, dtype=torch.bool)


def build(folder: Path, case: HandMade, *, method: str, over: str = "plain") -> str:
    """Build two experts of a class over their plain language model, or over one of their class."""
    family = MULTIMODAL[case.family]
    base = make_base(family) if over == "plain" else make_multimodal(family, seed=5)
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    recipe: dict[str, Any] = {
        "name": method,
        "base": "base",
        "method": method,
        "density": 0.6,
        "output": "store",
        "experts": {},
    }
    for number, name in enumerate(("one", "two")):
        if over == "plain":
            expert = make_multimodal(family, seed=11 + number)
            give_language_model(base, expert, seed=100 + number)
        else:
            expert = tune(base, seed=11 + number)
        expert.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        recipe["experts"][name] = {"path": name, "modality": case.modality}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run(make_plan(read_recipe(folder / "recipe.yaml"))).uri


@torch.inference_mode()
def answer(model: Any, ids: list[int], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits that the expert's own class gives, [tokens, vocabulary]."""
    tokens = torch.tensor([ids])
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **tensors}
    logits: torch.Tensor = model(**arguments).logits[0]
    return logits


@torch.inference_mode()
def generate(model: Any, arguments: Mapping[str, torch.Tensor], *, rows: int) -> list[int]:
    """Return the greedy answer of the expert's own class, of tokens below `rows`."""
    above = list(range(rows, model.config.get_text_config().vocab_size))
    tokens: torch.Tensor = model.generate(
        **arguments,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=3,
        suppress_tokens=above or None,
    )
    answer: list[int] = tokens[0, arguments["input_ids"].shape[1] :].tolist()
    return answer


def check_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A composite has the base's rows of the vocabulary, a model perhaps more."""
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "over"),
    [(name, "plain") for name in CASES]
    + [(name, "multimodal") for name in CASES if name not in ONLY_OVER_PLAIN],
)
@pytest.mark.parametrize("method", ["ties", "mmer"])
def test_a_composite_answers_as_the_class_of_its_expert(
    name: str, method: str, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    family = MULTIMODAL[case.family]
    model_type = family.make_config().model_type
    monkeypatch.setitem(processor_inputs._INPUTS, model_type, lambda *_, **__: Inputs(case))
    uri = build(tmp_path, case, method=method, over=over)
    # In expansion with masks each token has weights of its own modality, so no class answers so.
    mode: dict[str, Any] = {"mode": "retention", "expert": "two"} if method == "mmer" else {}
    composite = load_composite(uri, **mode)
    export(uri, tmp_path / "export", expert="two")
    model_class = getattr(transformers, family.class_name)
    own = model_class.from_pretrained(tmp_path / "export", trust_remote_code=False).eval()
    text = composite.logits([Part("ids", QUESTION)])
    rows = text.shape[1]
    plain = {"input_ids": torch.tensor([QUESTION]), "attention_mask": torch.ones(1, len(QUESTION))}
    check_logits(text, answer(own, QUESTION, {}))
    parts = [Part("ids", QUESTION), Part("two", "by hand"), Part("ids", END)]
    logits = composite.logits(parts)
    ids = [*QUESTION, *case.ids, *END]
    arguments = case.to_arguments(ids) | case.make()
    check_logits(logits, answer(own, ids, arguments))
    assert not torch.allclose(logits[: len(QUESTION)], logits[-len(QUESTION) :])
    # The longer prompt pads the shorter one, which has other positions and another mask.
    answers = composite.generate_tokens([[Part("ids", QUESTION)], parts], max_new_tokens=NUM_NEW)
    assert answers[0] == generate(own, plain, rows=rows)
    assert answers[1] == generate(own, arguments, rows=rows)


@pytest.mark.parametrize("name", ONLY_OVER_PLAIN)
def test_a_base_of_a_class_that_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    uri = build(tmp_path, CASES[name], method="ties", over="multimodal")
    with pytest.raises(CheckpointError, match=ONLY_OVER_PLAIN[name]):
        load_composite(uri)


def test_every_served_class_is_compared() -> None:
    compared = {MULTIMODAL[case.family].make_config().model_type for case in CASES.values()}
    assert compared == COMPARED
