"""A model without weights has no memory for them, the buffers of the real one, and leaves torch as
it was.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.composite.meta_model import make_meta_model, set_parameter

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
)


def test_a_meta_model_has_the_names_and_shapes_of_the_model_no_memory_and_its_buffers() -> None:
    expected = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    found = make_meta_model(CONFIG, dtype=torch.bfloat16, owner="base")
    assert {name: (value.shape, value.dtype) for name, value in found.named_parameters()} == {
        name: (value.shape, value.dtype) for name, value in expected.named_parameters()
    }
    assert all(value.is_meta and not value.requires_grad for value in found.parameters())
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(
        torch.equal(value.float(), buffers[name].float())
        for name, value in LlamaForCausalLM(CONFIG).named_buffers()
    )
    assert not found.training


def test_tied_weights_are_one_parameter() -> None:
    tied = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": True})
    model = make_meta_model(tied, dtype=torch.float32, owner="base")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("fails", [False, True])
def test_models_made_afterwards_are_drawn_as_ever(fails: bool) -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.Linear(5, 7), nn.Embedding(5, 7)
        return [value.detach() for layer in layers for value in layer.parameters()]

    before = draw()
    if fails:
        with pytest.raises(
            CheckpointError,
            match=(
                r"base: transformers .* cannot make a llama model of its config.json \(KeyError:"
                r" 'unknown'\)"
            ),
        ):
            make_meta_model(
                LlamaConfig(**CONFIG.to_dict() | {"rope_parameters": {"rope_type": "unknown"}}),
                dtype=torch.float16,
                owner="base",
            )
    else:
        make_meta_model(CONFIG, dtype=torch.float16, owner="base")
    after = draw()
    assert all(
        one.equal(other) and not other.is_meta for one, other in zip(before, after, strict=True)
    )
    assert torch.get_default_dtype() == torch.float32


def test_threads_make_meta_models_at_once_and_other_modules_meanwhile() -> None:
    ends = Event()

    def make_layers() -> bool:
        found = True
        while not ends.is_set():
            layer = nn.Linear(3, 4)
            found = (
                found
                and layer.weight.device.type == "cpu"
                and layer.weight.requires_grad
                and bool(layer.weight.any())
            )
        return found

    def make(number: int) -> bool:
        dtype = torch.bfloat16 if number % 2 else torch.float32
        return all(
            value.is_meta and value.dtype == dtype
            for value in make_meta_model(CONFIG, dtype=dtype, owner="base").parameters()
        )

    with ThreadPoolExecutor(4) as pool:
        other = pool.submit(make_layers)
        made = list(pool.map(make, range(40)))
        ends.set()
        assert other.result()
    assert all(made)
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32


def test_a_value_of_another_shape_is_refused_by_name() -> None:
    model = make_meta_model(CONFIG, dtype=torch.float32, owner="base")
    with pytest.raises(
        CheckpointError,
        match=r"model.norm.weight: has shape \(31,\), the model of transformers .* has \(32,\)",
    ):
        set_parameter(model, "model.norm.weight", torch.zeros(31), shape=(31,))
    set_parameter(model, "model.norm.weight", torch.ones(32), shape=(32,))
    assert model.model.norm.weight.equal(torch.ones(32))
