from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import load_composite, make_plan, read_recipe, run
from mmerge.workers.composite.served_models import find_reason
from tests.model_configs import MULTIMODAL
from tests.model_families import (
    give_language_model,
    make_base,
    make_language_model,
    make_multimodal,
    tune,
)

REASONS = {
    "Mllama": r"'mllama': .*cross-attention",
    "Phi-4 multimodal": r"'phi4_multimodal': .*LoRA",
}
UNCOMPARED = ("Kimi K2.5",)
"""Families of which no test compares logits: each expert is compared when it is loaded."""


def build(folder: Path, base: Any, expert: Any, *, method: str = "ties") -> str:
    base.save_pretrained(folder / "base")
    expert.save_pretrained(folder / "expert")
    recipe = {
        "name": method,
        "base": "base",
        "method": method,
        "output": "store",
        "experts": {"one": {"path": "expert", "modality": "image"}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run(make_plan(read_recipe(folder / "recipe.yaml"))).uri


@pytest.mark.parametrize("name", REASONS)
def test_a_class_that_gives_its_decoder_more_than_embeddings_is_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    family = MULTIMODAL[name]
    base, expert = make_base(family), make_multimodal(family, seed=2)
    give_language_model(base, expert, seed=3)
    uri = build(tmp_path, base, expert)
    modes: tuple[dict[str, Any], ...] = ({}, {"mode": "retention", "expert": "one"})
    for mode in modes:
        with pytest.raises(CheckpointError, match=REASONS[name]) as error:
            load_composite(uri, **mode)
        assert f"mmerge export {uri} --expert one" in str(error.value)


@pytest.mark.parametrize("kind", ["llama4_text", "gpt_oss"])
def test_fused_experts_of_a_mixture_are_refused_in_expansion(kind: str, tmp_path: Path) -> None:
    base = make_language_model(kind)
    uri = build(tmp_path, base, tune(base, seed=3), method="mmer")
    with pytest.raises(CheckpointError, match=r"experts\..* holds the fused experts of a mixture"):
        load_composite(uri)


@pytest.mark.parametrize("name", UNCOMPARED)
def test_a_class_that_no_test_compares_is_served_only_with_the_comparison_at_load(
    name: str,
) -> None:
    config = MULTIMODAL[name].make_config().to_dict()
    assert "not been compared yet" in find_reason(config)
    assert find_reason(config, is_compared=True) == ""


def test_a_class_that_gives_single_layers_token_ids_is_refused() -> None:
    assert "for embeddings of single layers" in find_reason({"model_type": "gemma3n"})


def test_a_registered_encoder_serves_classes_that_take_embeddings_alone() -> None:
    config = MULTIMODAL["Kimi K2.5"].make_config().to_dict()
    assert "not been compared" in find_reason(config)
    assert find_reason(config, is_own_encoder=False) == ""
    config = MULTIMODAL["Qwen2-VL"].make_config().to_dict()
    assert find_reason(config) == ""
    assert "positions or masks" in find_reason(config, is_own_encoder=False)


def test_plain_language_models_are_served() -> None:
    assert find_reason({"model_type": "llama"}) == ""
