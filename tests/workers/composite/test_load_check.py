"""A composite that would answer otherwise than an expert's class is refused while it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import load_composite
from mmerge.workers.composite.decoder import composer as composer_module
from mmerge.workers.composite.decoder import load_check, text_answers
from mmerge.workers.modalities import processor_inputs
from mmerge.workers.modalities.decoder_inputs import DecoderCall, DecoderInputs
from mmerge.workers.modalities.text_rules import TextRules
from tests.model_configs import MULTIMODAL
from tests.workers.composite.test_served_logits import CASES, Inputs, build


def build_case(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.set_num_threads(1)
    case = CASES[name]
    model_type = MULTIMODAL[case.family].make_config().model_type
    monkeypatch.setitem(processor_inputs._INPUTS, model_type, lambda *_, **__: Inputs(case))
    return build(folder, case, method="mmer")


def without_positions(inputs: DecoderInputs) -> DecoderInputs:
    plain = DecoderInputs.from_embeds(inputs.embeds)
    return replace(inputs, positions=plain.positions, advance=plain.advance, axes=None)


FAULTS = {
    "Qwen2-VL": without_positions,
    "Qwen3-VL": lambda inputs: replace(inputs, layer_embeds=()),
    "Gemma 3": lambda inputs: replace(inputs, blocks=None),
    "PaliGemma": lambda inputs: replace(inputs, is_prefix=False),
    "LLaVA 1.5": lambda inputs: replace(inputs, embeds=inputs.embeds.roll(1, 0)),
}
"""What a composite would leave out, by case."""


@pytest.mark.parametrize("mode", ["expansion", "retention"])
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_carried_over_is_an_error_at_load(
    name: str, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = build_case(name, tmp_path, monkeypatch)
    expert = "two" if mode == "retention" else None
    load_composite(uri, mode=mode, expert=expert)
    encode = composer_module.encode_for_decoder
    monkeypatch.setattr(
        composer_module, "encode_for_decoder", lambda *part: FAULTS[name](encode(*part))
    )
    class_name = MULTIMODAL[CASES[name].family].class_name
    message = rf"expert '(one|two)': .* other logits in the composite than in {class_name}"
    with pytest.raises(CheckpointError, match=message):
        load_composite(uri, mode=mode, expert=expert)
    assert load_composite(uri, mode=mode, expert=expert, check=False)


def test_a_scale_of_logits_that_is_left_out_is_an_error_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = build_case("Aya Vision", tmp_path, monkeypatch)
    monkeypatch.setattr(text_answers.TextRules, "factor_to", lambda *_: 1.0)
    with pytest.raises(CheckpointError, match="other logits in the composite"):
        load_composite(uri, mode="retention", expert="two")


def test_a_comparison_that_fails_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = build_case("LLaVA 1.5", tmp_path, monkeypatch)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(load_check, "make_class_twin", fail)
    with pytest.raises(CheckpointError, match=r"cannot be compared .*no such layer.*--no-check"):
        load_composite(uri)


def test_an_argument_that_is_not_understood_is_refused_by_name() -> None:
    embeds = torch.zeros(1, 4, 8)
    call = DecoderCall(nn.Identity(), (), {"inputs_embeds": embeds, "states": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"expert 'a': .*Identity.*states \(Tensor \(2,\)\)"):
        call.read(1, 3, owner="expert 'a'")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[0, 0, 0, 3] = True
    call = DecoderCall(nn.Identity(), (), {"inputs_embeds": embeds, "attention_mask": mask})
    with pytest.raises(CheckpointError, match="attention_mask"):
        call.read(1, 3, owner="expert 'a'")


def test_classes_that_no_test_compares_need_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmerge.workers.composite import served_models

    uri = build_case("LLaVA 1.5", tmp_path, monkeypatch)
    monkeypatch.setattr(served_models, "COMPARED", set())
    load_composite(uri)
    with pytest.raises(CheckpointError, match="has not been compared yet"):
        load_composite(uri, check=False)


def test_rules_scale_only_by_factors() -> None:
    capped, plain = TextRules(None, False), TextRules(1.0, False)
    assert plain.factor_to(TextRules(0.25, False)) == 0.25
    assert capped.factor_to(capped) == 1.0
    assert capped.factor_to(plain) is None
