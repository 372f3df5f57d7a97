"""Composites whose base is a multimodal model: experts of its class, of text, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import Part, export, load_composite, make_plan, read_recipe, run
from mmerge.workers.composite.placement_planner import plan_placement
from mmerge.workers.modalities import processor_inputs
from tests.architectures import write_tokenizer
from tests.model_configs import MULTIMODAL
from tests.model_families import make_multimodal, tune
from tests.workers.composite.test_served_logits import (
    CASES,
    END,
    QUESTION,
    Inputs,
    answer,
    check_logits,
)

CASE = CASES["LLaVA 1.5"]
PARTS = [Part("ids", QUESTION), Part("image", "by hand"), Part("ids", END)]
IDS = [*QUESTION, *[CASE.token] * CASE.num_tokens, *END]


@pytest.fixture(autouse=True)
def _inputs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(processor_inputs._INPUTS, "llava", lambda *_, **__: Inputs(CASE))


def write(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_base(folder: Path) -> Any:
    return write(make_multimodal(MULTIMODAL["LLaVA 1.5"], seed=5), folder / "base")


def write_text_expert(base: Any, folder: Path) -> Any:
    """Write the plain language model within a multimodal one, tuned."""
    text = base.config.get_text_config()
    plain = transformers.AutoModelForCausalLM.from_config(text)
    plain.model.load_state_dict(base.get_decoder().state_dict())
    plain.lm_head.load_state_dict(base.lm_head.state_dict())
    return write(tune(plain, seed=7), folder)


def build(folder: Path, method: str, experts: dict[str, dict[str, Any]], **keys: Any) -> str:
    recipe = {
        "name": method,
        "base": "base",
        "method": method,
        "output": "store",
        "experts": experts,
        **keys,
    }
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
    return run(make_plan(read_recipe(folder / f"{method}.yaml"))).uri


def load_own(folder: Path) -> Any:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, trust_remote_code=False
    )
    return model.eval()


def test_expansion_of_one_expert_is_that_expert(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    write(tune(base, seed=6), tmp_path / "one")
    uri = build(tmp_path, "mmer", {"one": {"path": "one", "modality": "image"}}, density=0.6)
    export(uri, tmp_path / "export", expert="one")
    expected = answer(load_own(tmp_path / "export"), IDS, CASE.make())
    for policy in ("packed", "resident"):
        composite = load_composite(uri, policy=policy)
        check_logits(composite.logits(PARTS), expected)
    first = composite.generate_tokens([PARTS], max_new_tokens=3)[0][0]
    assert first == int(expected[-1].argmax())


def test_text_of_an_expansion_is_the_merged_model(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    experts = {}
    for number, name in enumerate(("one", "two")):
        write(tune(base, seed=6 + number), tmp_path / name)
        experts[name] = {"path": name, "modality": ("image", "audio")[number]}
    uri = build(tmp_path, "mmer", experts, density=0.6)
    export(uri, tmp_path / "export")
    composite = load_composite(uri)
    text = composite.logits([Part("ids", QUESTION)])
    check_logits(text, answer(load_own(tmp_path / "export"), QUESTION, {}))
    # Each expert has an encoder of its own: θ₀ + mᵢ∘τ⋆.
    first, second = (composite.embed([Part(kind, "x")])[0] for kind in ("image", "audio"))
    assert not torch.allclose(first, second)


def test_an_encoder_that_is_not_merged_is_the_experts_own(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    write(tune(base, seed=6), tmp_path / "one")
    carry = ["*vision_tower*", "*multi_modal_projector*"]
    uri = build(tmp_path, "ties", {"one": {"path": "one", "modality": "image"}}, carry=carry)
    export(uri, tmp_path / "export", expert="one")
    expected = answer(load_own(tmp_path / "export"), IDS, CASE.make())
    check_logits(load_composite(uri).logits(PARTS), expected)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_an_expert_of_text_alone_leaves_the_base_its_encoder(modality: str, tmp_path: Path) -> None:
    base = write_base(tmp_path)
    write_text_expert(base, tmp_path / "text")
    carry = ["*vision_tower*", "*multi_modal_projector*"]
    experts = {"words": {"path": "text", "modality": modality}}
    uri = build(tmp_path, "task_arithmetic", experts, carry=carry)
    export(uri, tmp_path / "export")
    expected = answer(load_own(tmp_path / "export"), IDS, CASE.make())
    check_logits(load_composite(uri).logits(PARTS), expected)


def write_adapter(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Write a LoRA of a multimodal model; return the change of each adapted weight in memory."""
    generator = torch.Generator().manual_seed(9)
    tensors, changes = {}, {}
    for layer in range(2):
        path = f"model.language_model.layers.{layer}.self_attn.q_proj"
        a, b = (torch.randn(shape, generator=generator) / 8 for shape in ((3, 64), (64, 3)))
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        changes[f"{path}.weight"] = 2.0 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder.parent / "base" / name).read_bytes())
    return changes


@pytest.mark.parametrize("expert", [None, "one"])
@pytest.mark.parametrize("method", ["damc", "naive_mc"])
def test_adapters_over_a_multimodal_base_are_routed(
    method: str, expert: str | None, tmp_path: Path
) -> None:
    base = write_base(tmp_path)
    changes = write_adapter(base, tmp_path / "one")
    uri = build(tmp_path, method, {"one": {"path": "one", "modality": "image"}})
    state = dict(base.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            state[name].add_(change)
    mode: dict[str, Any] = {"mode": "retention", "expert": expert} if expert else {}
    composite = load_composite(uri, **mode)
    check_logits(composite.logits(PARTS), answer(base, IDS, CASE.make()))


def test_a_placement_counts_the_language_model_and_the_encoders(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    write(tune(base, seed=6), tmp_path / "one")
    uri = build(tmp_path, "ties", {"one": {"path": "one", "modality": "image"}})
    stages = plan_placement(uri, devices=[10**9, 10**9], by="layers", device_type="cpu").stages
    language = sum(
        value.numel() for name, value in base.named_parameters() if "language_model" in name
    )
    head = base.lm_head.weight.numel()
    assert sum(stage.memory.weights for stage in stages) == 4 * (language + head)
    stored = sum(value.numel() for value in load_file(tmp_path / "base/model.safetensors").values())
    embedding = base.get_input_embeddings().weight.numel()
    assert stages[0].memory.encoders == 4 * (stored - language - head + embedding)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mllama", "'mllama': .*cross-attention"),
        ("Phi-4 multimodal", "'phi4_multimodal': .*LoRA"),
    ],
)
def test_a_multimodal_base_of_a_class_that_is_not_served_is_refused(
    name: str, reason: str, tmp_path: Path
) -> None:
    base = write(make_multimodal(MULTIMODAL[name], seed=5), tmp_path / "base")
    write(tune(base, seed=6), tmp_path / "one")
    uri = build(tmp_path, "ties", {"one": {"path": "one", "modality": "image"}})
    with pytest.raises(CheckpointError, match=rf"the base is of type {reason}"):
        load_composite(uri)
