"""What an adapter saves takes part in the expert's weights as PEFT merges it, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.adapters.checkpoint import open_expert
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores

PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(lab: Any) -> Checkpoint:
    lab.dtype = torch.float32
    return Checkpoint(str(lab.make_base()), owner="base")


def make_pair(module: str, out: int = 16, width: int = 16, *, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn((4, width), generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn((out, 4), generator=generator),
    }


def open_adapter(
    lab: Any, base: Checkpoint, tensors: dict[str, torch.Tensor], **config: Any
) -> Checkpoint:
    folder: Path = lab.folder / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return open_expert(str(folder), owner="expert 'one'", base=base)


def read_values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    source = checkpoint.tensors[name]
    data = read_source(source, stores=OpenStores(), offset=0, num_bytes=source.spec.num_bytes)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.spec.shape)


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.7.self_attn.q_proj",
        "vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts",
    ],
)
def test_an_adapter_of_which_a_part_fits_nothing_is_refused(
    lab: Any, base: Checkpoint, module: str
) -> None:
    expert = open_adapter(lab, base, make_pair(QUERY) | make_pair(module))
    with pytest.raises(CheckpointError, match=f"1 of 2 adapters fit no Linear .*: {module}"):
        _ = expert.tensors


def test_two_adapters_of_one_linear_are_refused(lab: Any, base: Checkpoint) -> None:
    expert = open_adapter(
        lab, base, make_pair(QUERY) | make_pair(f"language_model.{QUERY}", seed=1)
    )
    with pytest.raises(CheckpointError, match=f"two adapters fit {QUERY}.weight"):
        _ = expert.tensors


@pytest.mark.parametrize("wrapper", ["base_layer", "modules_to_save", "modules_to_save.default"])
def test_tensors_saved_whole_replace_the_bases_under_every_name(
    lab: Any, base: Checkpoint, wrapper: str
) -> None:
    embedding = torch.randn(40, 16)
    saved = {f"{PREFIX}model.embed_tokens.{wrapper}.weight": embedding}
    expert = open_adapter(lab, base, make_pair(QUERY) | saved)
    assert expert.tensors.keys() == base.tensors.keys()
    assert torch.equal(read_values(expert, "model.embed_tokens.weight"), embedding)


def test_a_head_that_is_adapted_and_saved_is_adapted_as_saved(lab: Any, base: Checkpoint) -> None:
    head, pair = torch.randn(44, 16), make_pair("lm_head", out=44)
    expert = open_adapter(lab, base, pair | {f"{PREFIX}lm_head.base_layer.weight": head})
    a, b = (pair[f"{PREFIX}lm_head.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(read_values(expert, "lm_head.weight"), head + 2 * b @ a)


def test_an_adapted_head_of_a_tied_base_is_refused(lab: Any) -> None:
    lab.dtype = torch.float32
    lab.make_base()
    tensors = {name: value for name, value in lab.base.items() if name != "lm_head.weight"}
    folder = lab.write("tied", tensors, lab.config | {"tie_word_embeddings": True})
    tied = Checkpoint(str(folder), owner="base")
    expert = open_adapter(lab, tied, make_pair(QUERY) | make_pair("lm_head", out=40))
    with pytest.raises(CheckpointError, match="fit no Linear of the base: lm_head"):
        _ = expert.tensors


def test_trained_token_rows_are_refused_though_the_configuration_is_silent(
    lab: Any, base: Checkpoint
) -> None:
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
    expert = open_adapter(lab, base, make_pair(QUERY) | rows)
    with pytest.raises(CheckpointError, match=r"has trained token rows .*no list of tokens"):
        _ = expert.tensors


@pytest.mark.parametrize("wrapper", ["model.language_model.", "language_model.model.", "model."])
def test_an_adapter_of_a_multimodal_base_finds_its_language_model(lab: Any, wrapper: str) -> None:
    lab.dtype = torch.float32
    lab.make_base()
    tensors = {"language_model." + name: value for name, value in lab.base.items()}
    folder = lab.write("llava", tensors, {"model_type": "llava", "text_config": lab.config})
    multimodal = Checkpoint(str(folder), owner="base")
    pair = make_pair(f"{wrapper}layers.0.self_attn.q_proj")
    expert = open_adapter(lab, multimodal, pair)
    b, a = (pair[name] for name in sorted(pair, reverse=True))
    expected = lab.base[f"{QUERY}.weight"] + 2 * b @ a
    name = f"language_model.{QUERY}.weight"
    torch.testing.assert_close(read_values(expert, name), expected)
