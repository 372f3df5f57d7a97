"""Expansion of every served class: each token by the weights of its modality, as a naive loop does.

The naive model is the expert's own class with explicitly formed weights: the Linear layers of its
decoder multiply token by token, by the expert's weights or by those of text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import Part, export, load_composite
from mmerge.workers.modalities import processor_inputs
from tests.model_configs import MULTIMODAL
from tests.model_families import language_parameters
from tests.workers.composite.test_served_logits import (
    CASES,
    END,
    QUESTION,
    HandMade,
    Inputs,
    build,
    check_logits,
)

NOT_ROUTED = {
    "Qwen3-VL-MoE": r"its tensors do not fit Qwen3",
    "Qwen3-Omni thinker": r"its tensors do not fit Qwen3",
    "Llama 4": r"holds the fused experts of a mixture",
}
"""Families that are refused in expansion over a build of masks, and why."""
BASE_SCALES = {"Aya Vision": 0.25, "Granite Speech": 0.5}
"""Scale of the logits in the class of the base, whose head answers; the experts' classes have 1."""
FIRST_CASES: dict[str, HandMade] = {}
for _case in CASES.values():
    FIRST_CASES.setdefault(_case.family, _case)


class NaiveLinear(nn.Module):
    """Multiplies every token by one of two weights."""

    def __init__(self, expert: nn.Linear, text: nn.Linear, is_input: list[bool]) -> None:
        super().__init__()
        self.expert, self.text, self.is_input = expert, text, is_input
        self.weight = text.weight  # some layers look at its dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        assert len(rows) == len(self.is_input)
        outputs = [
            (self.expert if is_input else self.text)(row)
            for row, is_input in zip(rows, self.is_input, strict=True)
        ]
        return torch.stack(outputs).reshape(*inputs.shape[:-1], -1)


class NaiveEmbedding(nn.Module):
    """Embeds every token by one of two tables."""

    def __init__(self, expert: nn.Module, text: nn.Module, is_input: list[bool]) -> None:
        super().__init__()
        self.expert, self.text = expert, text
        self.is_input = torch.tensor(is_input)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = torch.where(
            self.is_input[None, :, None], self.expert(ids), self.text(ids)
        )
        return chosen


def to_naive(own: Any, text: dict[str, torch.Tensor], is_input: list[bool]) -> Any:
    """Return a model of the expert's class that takes the weights of text for tokens of text."""
    expert_embedding = copy.deepcopy(own.get_input_embeddings())
    decoder = own.get_decoder()
    decoder = getattr(decoder, "model", decoder) if hasattr(decoder, "lm_head") else decoder
    linears = {
        path: module
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("layers.")
    }
    expert_linears = {path: copy.deepcopy(module) for path, module in linears.items()}
    with torch.no_grad():
        for name, value in language_parameters(own).items():
            value[: len(text[name])] = text[name]
    for path, module in linears.items():
        parent, _, child = path.rpartition(".")
        naive = NaiveLinear(expert_linears[path], module, is_input)
        setattr(decoder.get_submodule(parent), child, naive)
    text_embedding = own.get_input_embeddings()
    own.set_input_embeddings(NaiveEmbedding(expert_embedding, text_embedding, is_input))
    return own


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in FIRST_CASES if name not in NOT_ROUTED])
def test_every_token_is_multiplied_by_the_weights_of_its_modality(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    case, family = FIRST_CASES[name], MULTIMODAL[name]
    model_type = family.make_config().model_type
    monkeypatch.setitem(processor_inputs._INPUTS, model_type, lambda *_, **__: Inputs(case))
    uri = build(tmp_path, case, method="mmer")
    logits = load_composite(uri).logits(
        [Part("ids", QUESTION), Part("two", "by hand"), Part("ids", END)]
    )
    export(uri, tmp_path / "export-text")
    export(uri, tmp_path / "export-two", expert="two")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export-text", trust_remote_code=False
    )
    text = {key: value.clone() for key, value in language_parameters(plain).items()}
    own = (
        getattr(transformers, family.class_name)
        .from_pretrained(tmp_path / "export-two", trust_remote_code=False)
        .eval()
    )
    is_input = [False] * len(QUESTION) + [True] * len(case.ids) + [False] * len(END)
    arguments = case.to_arguments([*QUESTION, *case.ids, *END]) | case.make()
    alone = own(**arguments).logits[0]
    expected = to_naive(own, text, is_input)(**arguments).logits[0]
    check_logits(logits, expected * BASE_SCALES.get(name, 1.0))
    assert not torch.allclose(logits, alone[:, : logits.shape[1]], atol=1e-2)


@pytest.mark.parametrize("name", NOT_ROUTED)
def test_a_class_whose_experts_are_not_routed_is_refused_in_expansion(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FIRST_CASES[name]
    model_type = MULTIMODAL[name].make_config().model_type
    monkeypatch.setitem(processor_inputs._INPUTS, model_type, lambda *_, **__: Inputs(case))
    with pytest.raises(CheckpointError, match=NOT_ROUTED[name]):
        load_composite(build(tmp_path, case, method="mmer"))
