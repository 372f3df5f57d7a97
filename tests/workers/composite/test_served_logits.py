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

from mmerge.pipeline import Part, export, load_composite, make_plan, read_recipe, run
from mmerge.workers.composite.served_models import SERVED
from mmerge.workers.modalities import processor_encoder
from tests.architectures import write_tokenizer
from tests.model_configs import MULTIMODAL
from tests.model_families import give_language_model, make_base, make_multimodal, tune

QUESTION, END = [5, 9, 17, 30], [21, 7, 33]
"""Token ids before and behind the input."""


@dataclass(frozen=True)
class HandMade:
    """Tensors of one input, and the ids of the placeholders that it replaces."""

    family: str
    token: int
    num_tokens: int
    make: Callable[[], dict[str, torch.Tensor]]
    modality: str = "image"


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def image_of(height: int, width: int) -> dict[str, torch.Tensor]:
    return {"image_sizes": torch.tensor([[height, width]])}


def sound(length: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": pixels(1, 16, length),
        "input_features_mask": torch.ones(1, length, dtype=torch.long),
    }


CASES = {
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


class Inputs:
    """Stands in for an expert's processor."""

    def __init__(self, case: HandMade) -> None:
        self.case = case

    def find_placeholder(self, modality: str, *, owner: str) -> str:
        return "placeholder"

    def make(self, placeholder: str, modality: str, part: Part) -> Mapping[str, Any]:
        ids = torch.full((1, self.case.num_tokens), self.case.token)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.case.make()}

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
    input_ids = torch.tensor([ids])
    logits: torch.Tensor = model(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **tensors
    ).logits[0]
    return logits


def check_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A composite has the base's rows of the vocabulary, a model perhaps more."""
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("over", ["plain", "multimodal"])
@pytest.mark.parametrize("method", ["ties", "mmer"])
@pytest.mark.parametrize("name", CASES)
def test_a_composite_answers_as_the_class_of_its_expert(
    name: str, method: str, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    family = MULTIMODAL[case.family]
    model_type = family.make_config().model_type
    monkeypatch.setitem(processor_encoder._INPUTS, model_type, lambda *_, **__: Inputs(case))
    uri = build(tmp_path, case, method=method, over=over)
    # In expansion with masks each token has weights of its own modality, so no class answers so.
    mode: dict[str, Any] = {"mode": "retention", "expert": "two"} if method == "mmer" else {}
    composite = load_composite(uri, **mode)
    export(uri, tmp_path / "export", expert="two")
    model_class = getattr(transformers, family.class_name)
    own = model_class.from_pretrained(tmp_path / "export", trust_remote_code=False).eval()
    text = composite.logits([Part("ids", QUESTION)])
    check_logits(text, answer(own, QUESTION, {}))
    parts = [Part("ids", QUESTION), Part("two", "by hand"), Part("ids", END)]
    logits = composite.logits(parts)
    ids = [*QUESTION, *[case.token] * case.num_tokens, *END]
    check_logits(logits, answer(own, ids, case.make()))
    assert not torch.allclose(logits[: len(QUESTION)], logits[-len(QUESTION) :])


def test_every_served_class_is_compared() -> None:
    compared = {MULTIMODAL[case.family].make_config().model_type for case in CASES.values()}
    assert compared == SERVED
