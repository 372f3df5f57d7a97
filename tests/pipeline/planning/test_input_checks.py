"""Inputs that a merge would leave out take part, or are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmerge.manifests.errors import CheckpointError, ManifestError
from mmerge.pipeline import export, load_composite, make_plan, read_recipe, run

BIAS = "model.layers.0.self_attn.q_proj.bias"
HEAD = "lm_head.weight"


def plan(lab: Any, raw: dict[str, Any], **changes: Any) -> Any:
    return make_plan(read_recipe(lab.write_recipe(raw | changes)))


def edit_config(lab: Any, name: str, **changes: Any) -> None:
    path = lab.folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(lab: Any, name: str, **changes: torch.Tensor | None) -> None:
    path = lab.folder / name / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = load_file(path) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def make_plain_experts(lab: Any, method: str) -> dict[str, Any]:
    """A base, and experts of its own class in its own names."""
    lab.make_base()
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for key, value in lab.base.items()
        }
        lab.write(name, tensors, lab.config)
    experts = {
        name: {"path": name, "modality": modality}
        for name, modality in (("one", "image"), ("two", "audio"))
    }
    return {"name": "x", "base": "base", "method": method, "output": "store", "experts": experts}


def test_shared_integers_that_differ_are_refused(lab: Any) -> None:
    raw = make_plain_experts(lab, "ties")
    name = "model.table"
    for folder in ("base", "one", "two"):
        edit_tensors(lab, folder, **{name: torch.arange(5)})
    plan(lab, raw)
    edit_tensors(lab, "two", **{name: torch.arange(5) + 1})
    with pytest.raises(CheckpointError, match=rf"{name}: expert 'two' has other values \(I64\)"):
        plan(lab, raw)
    plan(lab, raw, carry=[name])


def test_float64_that_differs_is_refused_as_no_method_merges_it(lab: Any) -> None:
    raw = make_plain_experts(lab, "ties")
    for factor, folder in enumerate(("base", "one", "two")):
        table = torch.full((2,), float(factor), dtype=torch.float64)
        edit_tensors(lab, folder, **{"model.table": table})
    with pytest.raises(CheckpointError, match="tensors of F64 cannot be merged"):
        plan(lab, raw)


def test_a_plain_merge_refuses_biases_that_the_base_lacks(lab: Any) -> None:
    raw = make_plain_experts(lab, "ties")
    edit_tensors(lab, "one", **{BIAS: torch.ones(16, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=rf"'one': its language model has {BIAS}, the base"):
        plan(lab, raw)


def test_masks_keep_biases_with_their_expert_and_refuse_every_other_use(lab: Any) -> None:
    raw = make_plain_experts(lab, "mmer")
    edit_tensors(lab, "one", **{BIAS: torch.ones(16, dtype=torch.bfloat16)})
    uri = run(plan(lab, raw)).uri
    export(uri, lab.folder / "out", expert="one")
    assert BIAS in load_file(lab.folder / "out" / "model.safetensors")
    for use in (
        lambda: load_composite(uri),
        lambda: load_composite(uri, mode="retention", expert="one"),
        lambda: export(uri, lab.folder / "text"),
    ):
        with pytest.raises(ManifestError, match=rf"'one' has {BIAS}.*export --expert one"):
            use()


@pytest.mark.parametrize("method", ["task_arithmetic", "mmer"])
def test_a_head_of_an_expert_over_a_tied_base_is_kept_or_refused(lab: Any, method: str) -> None:
    raw = make_plain_experts(lab, method)
    for name in ("base", "two"):
        edit_tensors(lab, name, **{HEAD: None})
        edit_config(lab, name, tie_word_embeddings=True)
    if method == "task_arithmetic":
        with pytest.raises(CheckpointError, match=f"'one': its language model has {HEAD}"):
            plan(lab, raw)
        return
    uri = run(plan(lab, raw)).uri
    export(uri, lab.folder / "out", expert="one")
    head = load_file(lab.folder / "out" / "model.safetensors")[HEAD]
    assert torch.equal(head, load_file(lab.folder / "one" / "model.safetensors")[HEAD])
    with pytest.raises(ManifestError, match=f"'one' has {HEAD}"):
        load_composite(uri)


@pytest.mark.parametrize("folder", ["base", "one"])
def test_a_tied_head_in_the_files_is_accepted_where_it_equals_the_embedding(
    lab: Any, folder: str
) -> None:
    raw = make_plain_experts(lab, "ties")
    for name in ("base", "one", "two"):
        edit_tensors(lab, name, **{HEAD: None})
        edit_config(lab, name, tie_word_embeddings=True)
    expected = {shard.name for shard in plan(lab, raw).merge_shards}
    tensors = load_file(lab.folder / folder / "model.safetensors")
    edit_tensors(lab, folder, **{HEAD: tensors["model.embed_tokens.weight"].clone()})
    assert {shard.name for shard in plan(lab, raw).merge_shards} == expected
    edit_tensors(lab, folder, **{HEAD: tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=f"ties the head .* but {HEAD} differs"):
        plan(lab, raw)
