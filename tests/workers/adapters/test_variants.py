"""Adapters of kinds that are not read are refused by their name."""

from __future__ import annotations

from typing import Any

import pytest

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.adapters.variants import refuse_variants


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_tomorrow": True}, "use_tomorrow"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "tomorrow"}, "'tomorrow'"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_a_variant_is_refused_by_its_name(config: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"this is .*{name}.*merge_and_unload"):
        refuse_variants(config, where="expert 'one'")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"peft_type": "LORA", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "bias": "all"},
        {"init_lora_weights": True, "use_dora": False, "trainable_token_indices": None},
        {"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    ],
)
def test_plain_adapters_pass(config: dict[str, Any]) -> None:
    refuse_variants(config, where="expert 'one'")


def test_settings_of_a_model_are_no_variants() -> None:
    config = {"model_type": "llava", "lora_r": 8, "use_cache": True, "use_mm_proj": True}
    refuse_variants(config, where="expert 'one'", is_peft_config=False)
    with pytest.raises(CheckpointError, match="QA-LoRA"):
        refuse_variants(config | {"use_qalora": True}, where="expert 'one'", is_peft_config=False)
