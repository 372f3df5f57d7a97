"""Adapters that scale or replace rows are merged like any expert, whatever the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab_adapters import (
    LINEARS,
    PREFIX,
    build,
    delta_of,
    experts,
    make_float32_base,
    write_adapter,
)

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import make_plan, read_recipe
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores
from mmerge.workers.exports.lora_average import write_average
from mmerge.workers.reconstruction.weights import text_weight


@pytest.fixture
def raw(lab: Any) -> dict[str, Any]:
    return make_float32_base(lab)


def make_dora(lab: Any) -> dict[str, torch.Tensor]:
    """Return the magnitudes of DoRA for the factors of `make_factors`."""
    return {
        f"{PREFIX}model.layers.{layer}.{linear}.lora_magnitude_vector": torch.rand(
            lab.base[f"model.layers.{layer}.{linear}.weight"].shape[0]
        )
        for layer in range(lab.config["num_hidden_layers"])
        for linear in LINEARS
    }


def test_an_adapter_that_replaces_and_scales_rows_is_merged_whatever_the_blocks(
    lab: Any, raw: dict[str, Any]
) -> None:
    lab.config |= {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "vocab_size": 300}
    lab.make_base()
    magnitudes = make_dora(lab)
    rows = torch.randn(2, 256)
    token_rows = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    embedding = torch.randn(320, 256)
    saved = {f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": embedding}
    factors = write_adapter(
        lab,
        "one",
        seed=1,
        more=magnitudes | saved | {token_rows: rows},
        use_dora=True,
        trainable_token_indices=[7, 310],
    )
    write_adapter(lab, "two", seed=2)
    recipe = raw | {"method": "mmer", "density": 1.0}
    recipe["experts"] = {
        "one": {"path": "one", "modality": "image"},
        "two": {"path": "two", "modality": "audio"},
    }
    readers = [
        build(lab, recipe | {"output": name}, block_entries=entries, max_shard_bytes=size)
        for name, entries, size in (("a", 1 << 18, 1 << 31), ("b", 1 << 16, 90_000))
    ]
    names = [*lab.base]
    values = [{name: text_weight(reader, name) for name in names} for reader in readers]
    assert all(torch.equal(values[0][name], values[1][name]) for name in names)
    extra = [reader.read("model.embed_tokens.weight", "extra_rows", "one") for reader in readers]
    embedding[[7, 310]] = rows
    for data in extra:
        assert torch.equal(data, embedding[300:])
    name = "model.layers.0.self_attn.q_proj.weight"
    adapted = lab.base[name] + delta_of(factors, name, 2.0)
    scales = magnitudes[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    expected = adapted * (scales / adapted.norm(dim=1))[:, None]
    plan = make_plan(read_recipe(lab.write_recipe(recipe)))
    source = plan.checkpoints[1].tensors[name]
    data = read_source(source, stores=OpenStores(), offset=0, num_bytes=source.spec.num_bytes)
    formed = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(expected.shape)
    torch.testing.assert_close(formed, expected, rtol=1e-5, atol=1e-6)


def test_a_base_that_is_replaced_gives_another_dora_expert(lab: Any, raw: dict[str, Any]) -> None:
    write_adapter(lab, "one", seed=1, more=make_dora(lab), use_dora=True)
    recipe = raw | {"experts": experts("one")}
    first = build(lab, recipe)
    for name in lab.base:
        lab.base[name] = lab.base[name] + 0.5
    lab.write("base", lab.base, lab.config)
    second = build(lab, recipe | {"output": "again"})
    name = "model.layers.0.self_attn.q_proj.weight"
    fresh = build(lab, recipe | {"output": "fresh"})
    assert torch.equal(text_weight(second, name), text_weight(fresh, name))
    assert not torch.equal(text_weight(first, name), text_weight(second, name))


@pytest.mark.parametrize("method", ["damc"])
def test_what_needs_plain_adapters_refuses_others(
    lab: Any, raw: dict[str, Any], method: str
) -> None:
    write_adapter(lab, "one", seed=1, more=make_dora(lab), use_dora=True)
    with pytest.raises(CheckpointError, match=f"{method} reads plain LoRA"):
        make_plan(
            read_recipe(lab.write_recipe(raw | {"method": method, "experts": experts("one")}))
        )
    folders = [str(lab.folder / "one")] * 2
    with pytest.raises(CheckpointError, match="average-lora reads plain LoRA"):
        write_average(folders, lab.folder / "written", strategy="mean", density=0.2)
