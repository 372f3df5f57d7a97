from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import transformers

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.families.name_map import UnknownClass, is_language_name, map_names
from mmerge.workers.families.text_config import resolve_text_config
from tests.model_configs import LANGUAGE_MODELS, MULTIMODAL
from tests.model_families import make_base, make_multimodal

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}


def test_every_family_names_its_language_model_as_the_plain_one() -> None:
    for name, family in MULTIMODAL.items():
        base, expert = make_base(family), make_multimodal(family, seed=2)
        names = []
        for model in (base, expert):
            config = model.config.to_dict() | {"architectures": [type(model).__name__]}
            names.append(set(map_names(config, model.state_dict()).by_parameter()))
        ours = {canonical for canonical in names[0] if is_language_name(canonical)}
        assert ours == names[0], name
        assert ours <= names[1], name
        assert not [other for other in names[1] if other.startswith("unplaced.")], name


def test_a_name_that_the_class_lacks_is_placed_nowhere() -> None:
    names = map_names(LLAMA, ["model.norm.weight", "model.extra.weight"]).stored
    assert set(names) == {"decoder.norm.weight", "unplaced.model.extra.weight"}


def test_two_tensors_of_one_parameter_are_an_error() -> None:
    config = make_multimodal(MULTIMODAL["LLaVA 1.5"], seed=1).config.to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    twice = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    with pytest.raises(CheckpointError, match=f"{twice[0]} and {twice[1]} are one parameter"):
        _ = map_names(config, twice).stored


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_class_is_made_with_an_attention_kernel_of_the_hub(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.load_and_register_attn_kernel",
        lambda name, *_: loaded.append(name),
    )
    config = LLAMA | {key: "kernels-community/evil"}
    with pytest.raises(UnknownClass, match=f"{key} 'kernels-community/evil' names code outside"):
        map_names(config, ["model.norm.weight"])
    with pytest.raises(CheckpointError, match="names code outside transformers"):
        resolve_text_config(config)
    assert loaded == []


def test_no_class_of_a_billion_layers_is_made() -> None:
    with pytest.raises(UnknownClass, match="num_hidden_layers"):
        map_names(LLAMA | {"num_hidden_layers": 10**9}, [])


def test_unknown_classes_are_named() -> None:
    with pytest.raises(UnknownClass, match="does not know model type 'llava_llama'"):
        map_names({"model_type": "llava_llama"}, [])
    with pytest.raises(UnknownClass, match="no model class 'Nothing'"):
        map_names(LLAMA | {"architectures": ["Nothing"]}, [])
    with pytest.raises(UnknownClass, match="no model class 'Trainer'"):
        map_names(LLAMA | {"architectures": ["Trainer"]}, [])
    for architectures in (5, {"first": "LlamaForCausalLM"}, "LlamaForCausalLM", [5]):
        with pytest.raises(UnknownClass, match="expected a list with the name of a model class"):
            map_names(LLAMA | {"architectures": architectures}, [])
    with pytest.raises(UnknownClass, match="cannot make LlamaForCausalLM"):
        map_names(LLAMA | {"num_attention_heads": 0}, [])


def test_no_memory_is_taken_for_the_weights_of_a_class() -> None:
    large = LLAMA | {"hidden_size": 1 << 15, "vocab_size": 1 << 18, "num_hidden_layers": 100}
    names = map_names(large, ["model.layers.99.mlp.up_proj.weight"])
    assert names.stored == {
        "decoder.layers.99.mlp.up_proj.weight": "model.layers.99.mlp.up_proj.weight"
    }


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_absent_and_null_values_are_those_of_the_class(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    nulls = {"model_type": kind, "num_key_value_heads": None}
    resolved = resolve_text_config(nulls)
    assert resolved["hidden_size"] == config.hidden_size
    assert resolved["num_key_value_heads"] is not None


def test_the_module_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mmerge.workers.families.name_map, mmerge.workers.families.text_config;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
