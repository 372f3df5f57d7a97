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
    "Qwen2-VL": r"'qwen2_vl': .*positions of three dimensions \(M-RoPE\)",
    "Qwen2.5-VL": r"'qwen2_5_vl': .*M-RoPE",
    "Qwen2.5-Omni thinker": r"'qwen2_5_omni_thinker': .*M-RoPE",
    "Qwen3-VL": r"'qwen3_vl': .*deepstack",
    "Qwen3.5": r"'qwen3_5': .*M-RoPE",
    "GLM-4V": r"'glm4v': .*M-RoPE",
    "PaliGemma": r"'paligemma': .*both directions within the image and the prompt",
    "PaliGemma 2": r"'paligemma': .*both directions",
    "Gemma 3": r"'gemma3': .*both directions within an image,",
    "Aya Vision": r"'aya_vision': .*does not scale logits",
    "Mllama": r"'mllama': .*cross-attention",
    "Phi-4 multimodal": r"'phi4_multimodal': .*LoRA",
    "Granite Speech": r"'granite_speech': .*not been compared",
    "Llama 4": r"'llama4': .*not been compared",
}


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


def test_a_registered_encoder_serves_classes_without_a_known_difference() -> None:
    config = MULTIMODAL["Granite Speech"].make_config().to_dict()
    assert "not been compared" in find_reason(config, is_own_encoder=True)
    assert find_reason(config, is_own_encoder=False) == ""
    config = MULTIMODAL["Qwen2-VL"].make_config().to_dict()
    assert "M-RoPE" in find_reason(config, is_own_encoder=False)


def test_plain_language_models_are_served() -> None:
    assert find_reason({"model_type": "llama"}, is_own_encoder=True) == ""
