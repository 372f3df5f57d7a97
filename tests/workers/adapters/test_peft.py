"""The weights of every kind of PEFT adapter equal those of PEFT's `merge_and_unload`, or a refusal
names the kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.adapters.checkpoint import open_expert
from mmerge.workers.adapters.variants import refuse_variants
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "head_dim": 4,
}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3_moe": {"model_type": "qwen3_moe"} | EXPERTS,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 4}
    | {"intermediate_size": 16},
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Kind:
    """One kind of LoRA, as a user of PEFT writes it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = "llama"
    rows: int | None = None
    """Rows that the embedding was resized to before training."""


MERGED = [
    Kind("plain"),
    Kind("rslora", {"use_rslora": True}),
    Kind(
        "patterns",
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*.o_proj": 5}},
    ),
    Kind("bias of all", {"bias": "all"}, "qwen2"),
    Kind("bias of adapted", {"bias": "lora_only"}, "qwen2"),
    Kind("modules_to_save", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    Kind("gaussian", {"init_lora_weights": "gaussian"}),
    Kind("orthogonal", {"init_lora_weights": "orthogonal"}),
    Kind("all linear", {"target_modules": "all-linear"}),
    Kind("some layers", {"layers_to_transform": [1]}),
    Kind("DoRA", {"use_dora": True}),
    Kind("DoRA, rslora", {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}),
    Kind("head", {"target_modules": ["lm_head", "q_proj"]}),
    Kind("DoRA of the head", {"use_dora": True, "target_modules": ["lm_head", "q_proj"]}),
    Kind("embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    Kind("tied embedding", {"target_modules": ["embed_tokens", "q_proj"]}, "llama, tied"),
    Kind("resized", {}, rows=44),
    Kind("resized, adapted", {"target_modules": ["embed_tokens", "lm_head"]}, rows=44),
    Kind("token rows", {"trainable_token_indices": [3, 39, 0]}),
    Kind("token rows, tied", {"trainable_token_indices": [3, 5]}, "llama, tied"),
    Kind("rows of both", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 2]}}),
    Kind("added token rows", {"trainable_token_indices": [41, 43]}, rows=44),
    Kind("token rows and DoRA", {"trainable_token_indices": [7], "use_dora": True}),
    Kind("experts", {"target_parameters": FUSED}, "qwen3_moe"),
    Kind("experts, rslora", {"target_parameters": FUSED, "use_rslora": True}, "qwen3_moe"),
    Kind("down_proj", {"target_parameters": FUSED[1:], "target_modules": []}, "qwen3_moe"),
    Kind("old names", {"target_modules": ["w1", "w2", "w3", "q_proj"]}, "mixtral"),
    Kind(
        "patterns of experts",
        {"target_parameters": FUSED, "rank_pattern": {"experts.down_proj": 3}},
        "qwen3_moe",
    ),
    Kind("router", {"target_parameters": ["mlp.gate.weight", *FUSED]}, "qwen3_moe"),
    Kind("square experts", {"target_parameters": FUSED}, "gpt_oss"),
]
REFUSED = [
    ("PiSSA", Kind("", {"init_lora_weights": "pissa"})),
    ("OLoRA", Kind("", {"init_lora_weights": "olora"})),
    ("DoRA of an embedding", Kind("", {"target_modules": ["embed_tokens"], "use_dora": True})),
    ("aLoRA", Kind("", {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"})),
    ("QA-LoRA", Kind("", {"use_qalora": True, "qalora_group_size": 4})),
    ("lora_bias", Kind("", {"lora_bias": True}, "qwen2")),
    ("layer_replication", Kind("", {"layer_replication": [[0, 2], [1, 2]]})),
]


def make_base(folder: Path, name: str) -> Any:
    import transformers

    settings = SIZES | BASES[name]
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model.parameters())
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def randomise(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn_like(parameter) + 0.5 * (parameter.ndim == 1))


def write_adapter(folder: Path, model: Any, config: Any) -> Any:
    """Write an adapter with random weights, and return PEFT's model of it."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(folder)
    return adapted


def write_lora(folder: Path, model: Any, kind: Kind) -> Any:
    if kind.rows is not None:
        model.resize_token_embeddings(kind.rows, mean_resizing=False)
        randomise([model.get_input_embeddings().weight, model.get_output_embeddings().weight])
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]} | kind.settings
    return write_adapter(folder, model, peft.LoraConfig(**settings))


def read_values(source: TensorSource) -> torch.Tensor:
    """Return a tensor read in pieces that end in the middle of rows."""
    stores, num_bytes, step = OpenStores(), source.spec.num_bytes, 4 * 37
    data = b"".join(
        bytes(
            read_source(source, stores=stores, offset=start, num_bytes=min(step, num_bytes - start))
        )
        for start in range(0, num_bytes, step)
    )
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.spec.shape)


def compare(expert: Checkpoint, merged: Any, folder: Path) -> None:
    """Check that an expert has the tensors of a merged model, within 2e-6 of the largest."""
    merged.save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    tensors = expert.tensors
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        difference = (read_values(tensors[name]) - value).abs().max()
        assert difference <= 2e-6 * value.abs().max(), name


@pytest.mark.parametrize("kind", MERGED, ids=lambda kind: kind.name)
def test_the_weights_of_an_adapter_are_those_that_peft_merges(tmp_path: Path, kind: Kind) -> None:
    model = write_lora(tmp_path / "adapter", make_base(tmp_path / "base", kind.base), kind)
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    expert = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)
    compare(expert, model.merge_and_unload(), tmp_path / "merged")


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=[name for name, _ in REFUSED])
def test_a_kind_that_is_not_read_is_refused_by_its_name(
    tmp_path: Path, name: str, kind: Kind
) -> None:
    write_lora(tmp_path / "adapter", make_base(tmp_path / "base", kind.base), kind)
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    with pytest.raises(CheckpointError, match=f"{name}.*merge_and_unload"):
        _ = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base).tensors


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_is_merged_over_the_original_base(
    tmp_path: Path, initialisation: str
) -> None:
    model = make_base(tmp_path / "base", "llama")
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config = peft.LoraConfig(**settings, init_lora_weights=initialisation)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = initialisation
    randomise(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    expert = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)
    compare(expert, adapted.merge_and_unload(), tmp_path / "merged")


def test_trained_token_rows_alone_are_an_adapter(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[1, 4])
    model = write_adapter(tmp_path / "adapter", make_base(tmp_path / "base", "llama"), config)
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    expert = open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)
    compare(expert, model.merge_and_unload(), tmp_path / "merged")


READ_TYPES = {"LORA", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize("peft_type", sorted({item.value for item in peft.PeftType} - READ_TYPES))
def test_every_other_type_that_peft_knows_is_refused_by_its_name(
    tmp_path: Path, peft_type: str
) -> None:
    with pytest.raises(CheckpointError, match=f"this is {peft_type}.*merge_and_unload"):
        refuse_variants({"peft_type": peft_type}, where="expert 'one'")


OTHER_TYPES: dict[str, Callable[[], Any]] = {
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_a_folder_of_another_type_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "adapter", make_base(tmp_path / "base", "llama"), OTHER_TYPES[name]())
    base = Checkpoint(str(tmp_path / "base"), owner="base")
    with pytest.raises(CheckpointError, match=f"this is {name}.*merge_and_unload"):
        open_expert(str(tmp_path / "adapter"), owner="expert 'one'", base=base)


def test_every_setting_of_lora_is_known(tmp_path: Path) -> None:
    """A release of PEFT with a setting that is not looked at makes this fail."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"]).to_dict()
    assert sorted(set(config) - REVIEWED_SETTINGS) == []


REVIEWED_SETTINGS = {
    # Read.
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"),
    *("trainable_token_indices", "target_parameters", "peft_version"),
    # The files themselves show what they decide.
    *("target_modules", "exclude_modules", "modules_to_save", "bias", "layers_to_transform"),
    *("layers_pattern", "ensure_weight_tying"),
    # Refused.
    *("init_lora_weights", "fan_in_fan_out", "layer_replication", "lora_bias", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
    "monteclora_config",
    # Of training, or of the ways that are refused.
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "megatron_config", "megatron_core"),
    # Of the file.
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
}
