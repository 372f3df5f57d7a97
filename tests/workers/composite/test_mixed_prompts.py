"""Prompts of several experts, whose classes place and mask their inputs differently.

Expected are logits of a naive forward pass: every token is multiplied by explicitly formed weights
of its modality, and rotated by positions that are written down by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mmerge.manifests.errors import PromptError
from mmerge.pipeline import Part, load_composite, make_plan, read_recipe, run
from mmerge.workers.composite.decoder.prompt_inputs import Piece, compose
from mmerge.workers.composite.routing import TEXT
from mmerge.workers.modalities import processor_inputs
from mmerge.workers.modalities.decoder_inputs import DecoderInputs
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader
from tests.architectures import NaiveLinear, write_tokenizer
from tests.model_configs import MULTIMODAL
from tests.model_families import give_language_model, make_base, make_multimodal
from tests.workers.composite.test_served_logits import CASES, Inputs

EXPERTS = {"eye": "Qwen2-VL", "ear": "Qwen2-Audio"}
SECTIONS = [0, 0, 1, 1, 1, 2, 2, 2]
"""Dimension of each rotary frequency of Qwen2-VL here: sections of 2, 3 and 3."""


def build(folder: Path) -> tuple[str, Any]:
    base = make_base(MULTIMODAL["Qwen2-VL"])
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    experts = {}
    for number, (name, case) in enumerate(EXPERTS.items()):
        expert = make_multimodal(MULTIMODAL[CASES[case].family], seed=11 + number)
        give_language_model(base, expert, seed=100 + number)
        expert.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        experts[name] = {"path": name, "modality": CASES[case].modality}
    recipe = {"name": "mixed", "base": "base", "method": "mmer", "density": 0.6, "output": "store"}
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "experts": experts}, sort_keys=False)
    )
    return run(make_plan(read_recipe(folder / "recipe.yaml"))).uri, base


def form_weight(reader: BuildReader, name: str, modality: int) -> torch.Tensor:
    base, delta = reader.read(name, "base"), reader.read(name, "delta")
    masks = [
        unpack_mask(reader.read_packed_mask(name, expert), base.shape).float() for expert in EXPERTS
    ]
    mask = (masks[0] + masks[1]) / 2 if modality == TEXT else masks[modality]
    return base + mask * delta


class HandRotary(nn.Module):
    """Cosines and sines of positions int64 [3, tokens], each frequency by one dimension."""

    def __init__(self, positions: torch.Tensor, theta: float) -> None:
        super().__init__()
        count = len(SECTIONS)
        angles = torch.empty(positions.shape[1], count)
        for token in range(positions.shape[1]):
            for index, dimension in enumerate(SECTIONS):
                speed = theta ** (-index / count)
                angles[token, index] = float(positions[dimension, token]) * speed
        self.angles = torch.cat([angles, angles], dim=-1)[None]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.angles.cos(), self.angles.sin()


@torch.inference_mode()
def answer_naively(
    uri: str, model: Any, embeds: torch.Tensor, ids: list[int], positions: torch.Tensor
) -> torch.Tensor:
    reader = BuildReader(uri)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(form_weight(reader, name, TEXT))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            kinds = range(-1, len(EXPERTS))
            weights = {kind: form_weight(reader, f"{path}.weight", kind) for kind in kinds}
            biases = None
            if module.bias is not None:
                biases = {kind: form_weight(reader, f"{path}.bias", kind) for kind in kinds}
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, NaiveLinear(weights, biases, ids))
    theta = model.config.rope_parameters["rope_theta"]
    model.model.rotary_emb = HandRotary(positions, theta)
    logits: torch.Tensor = model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    return logits


def place_by_hand() -> torch.Tensor:
    """Positions of three ids, an image of 4 x 6 tokens, an id, a sound of 50 tokens and two ids."""
    positions = [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    positions += [(3, 3 + row, 3 + column) for row in range(4) for column in range(6)]
    # The class continues behind the longer side of the image.
    start = 3 + 6
    positions += [(start + step,) * 3 for step in range(1 + 50 + 2)]
    return torch.tensor(positions).T


def test_each_input_keeps_its_own_positions_in_a_prompt_of_two_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    for case in map(CASES.__getitem__, EXPERTS.values()):
        kind = MULTIMODAL[case.family].make_config().model_type
        maker = lambda *_, case=case, **__: Inputs(case)  # noqa: E731
        monkeypatch.setitem(processor_inputs._INPUTS, kind, maker)
    uri, base = build(tmp_path)
    composite = load_composite(uri)
    parts = [
        Part("ids", [5, 6, 7]),
        Part("eye", "by hand"),
        Part("ids", [9]),
        Part("ear", "by hand"),
        Part("ids", [11, 12]),
    ]
    embeds, ids = composite.embed(parts)
    positions = place_by_hand()
    assert positions.shape[1] == len(ids)
    expected = answer_naively(uri, base, embeds.clone(), ids.tolist(), positions)
    logits = composite.logits(parts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # Generated tokens go on from there: as many tokens in one pass give the same answer.
    first, second = composite.generate_tokens([parts], max_new_tokens=2)[0]
    assert first == int(expected[-1].argmax())
    longer = composite.logits([*parts, Part("ids", [first])])
    assert second == int(longer[-1].argmax())
    # Text alone is rotated as in the base, beside a prompt that is not.
    text = [Part("ids", [5, 9, 17])]
    answers = composite.generate_tokens([text, parts], max_new_tokens=2)
    assert answers == [composite.generate_tokens([text], max_new_tokens=2)[0], [first, second]]


def piece(name: str, *, is_prefix: bool = False, axes: tuple[int, ...] | None = None) -> Piece:
    inputs = DecoderInputs(
        torch.ones(2, 4), torch.arange(2).expand(3, -1), 2, axes=axes, is_prefix=is_prefix
    )
    return Piece(inputs, 0, name)


def test_a_prefix_and_a_causal_input_are_not_composed() -> None:
    with pytest.raises(PromptError, match=r"class of expert 'a' .* class of expert 'b' does not"):
        compose([piece("a", is_prefix=True), piece("b")])
    text = Piece(DecoderInputs.from_embeds(torch.ones(3, 4)), TEXT, "")
    prompt = compose([piece("a", is_prefix=True), text], num_answer=1)
    assert prompt.blocks is not None
    assert prompt.blocks.tolist() == [0, 0, 0, 0, -1]


def test_inputs_of_heads_of_different_width_are_not_composed() -> None:
    with pytest.raises(PromptError, match=r"rotate \[2, 3\] frequencies"):
        compose([piece("a", axes=(0, 1)), piece("b", axes=(0, 1, 2))])
