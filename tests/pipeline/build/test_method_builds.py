"""Builds of every kind of method: bytes that depend on nothing but inputs and numbers, composites
that load, recipes that are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline import (
    Part,
    export,
    load_composite,
    make_plan,
    parse_recipe,
    read_recipe,
    run,
    verify,
)
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.workers.composite.routed_linear import RoutedLinear
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

RECIPES: dict[str, dict[str, Any]] = {
    "entries": {"method": "dare_linear"},
    "entries and sums per tensor": {"method": "dare_ties", "rescale": "norm"},
    "entries and a sum over the model": {"method": "ties", "zero_sign": "majority"},
    "entries and ranks over the model": {"method": "pcb"},
    "entries and ranks per tensor": {"method": "pcb", "scope": "tensor"},
    "rows and sums per tensor": {"method": "della", "rescale": "norm"},
    "whole tensors": {"method": "breadcrumbs"},
    "whole tensors with exact counts": {"method": "ties", "scope": "tensor", "count": "exact"},
    "masks and rescalers": {"method": "emr"},
    "masks": {"method": "tall_masks", "multi_task": "ties"},
}


def make_large(lab: Any) -> dict[str, Any]:
    """Checkpoints with tensors of more entries than the smallest block, and rows that end in no
    block.
    """
    lab.config |= {
        "hidden_size": 264,
        "intermediate_size": 390,
        "head_dim": 66,
        "vocab_size": 300,
        "num_hidden_layers": 1,
    }
    return lab.make_all()


def contents(folder: Path) -> dict[str, torch.Tensor]:
    reader = BuildReader(str(folder))
    found = {
        f"{role}/{name}": reader.read(name, role)
        for role in ("delta", "merged")
        for name in reader.names(role)
    }
    for expert in reader.expert_names:
        found |= {
            f"mask/{expert}/{name}": reader.read_packed_mask(name, expert)
            for name in reader.names("mask", expert)
        }
    factors = [record.rescaler or 1.0 for record in reader.manifest.experts]
    return found | {"rescalers": torch.tensor(factors, dtype=torch.float64)}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_bits_depend_neither_on_blocks_nor_on_how_tensors_are_split(
    recipe: dict[str, Any], lab: Any
) -> None:
    raw = make_large(lab) | recipe
    raw.pop("density", None)
    for name, options in (
        ("a", {"block_entries": 1 << 16}),
        ("b", {"block_entries": 1 << 18}),
        ("c", {"max_shard_bytes": 50_000}),
    ):
        run(make_plan(read_recipe(lab.write_recipe(raw | {"output": name})), **options))
    whole, blocks, pieces = (contents(lab.folder / name) for name in "abc")
    assert whole.keys() == blocks.keys() == pieces.keys()
    for name, value in whole.items():
        assert value.equal(blocks[name]), f"{name} depends on the block size"
        assert value.equal(pieces[name]), f"{name} depends on how tensors are split"
    one, other = (BuildReader(str(lab.folder / name)).manifest for name in "ab")
    assert one == other


@pytest.mark.ray
def test_bits_do_not_depend_on_the_executor(lab: Any) -> None:
    raw = make_large(lab)
    executor = RayExecutor(num_workers=2)
    try:
        for name in ("rows and sums per tensor", "masks and rescalers", "whole tensors"):
            builds = []
            for output, where in (("a", None), ("b", executor)):
                recipe = raw | RECIPES[name] | {"output": f"{output}-{name}"}
                builds.append(run(make_plan(read_recipe(lab.write_recipe(recipe))), executor=where))
            assert builds[0].manifest == builds[1].manifest
    finally:
        executor.close()


def test_a_whole_tensor_is_never_split_and_its_memory_is_planned(lab: Any) -> None:
    raw = lab.make_all()
    entry = make_plan(read_recipe(lab.write_recipe(raw | {"method": "ties"})), max_shard_bytes=300)
    whole = make_plan(
        read_recipe(lab.write_recipe(raw | {"method": "breadcrumbs"})), max_shard_bytes=300
    )
    assert len(entry.merge_shards) > len(whole.merge_shards)
    assert all(
        tensor.row_start == 0 and tensor.row_stop == tensor.num_rows
        for shard in whole.merge_shards
        for tensor in shard.tensors
    )
    lab.config |= {"vocab_size": 4000, "hidden_size": 256, "head_dim": 64}
    raw = lab.make_all(1)
    small = make_plan(
        read_recipe(lab.write_recipe(raw | {"method": "ties"})), block_entries=1 << 16
    )
    # Breadcrumbs has a compiled path that streams over its tensors; Arcee Fusion holds them.
    large = make_plan(
        read_recipe(lab.write_recipe(raw | {"method": "arcee_fusion"})), block_entries=1 << 16
    )
    assert large.peak_bytes - small.peak_bytes > 4000 * 256 * 4 * 8


def to_lab(method: str, repository: Path, output: Path) -> str:
    folder = repository / "examples" / "lab" / "recipes"
    raw = yaml.safe_load((folder / "ties.yaml").read_text()) | {
        "method": method,
        "output": str(output),
        "name": method,
    }
    run(make_plan(parse_recipe(raw, folder=folder)))
    verify(f"{output}#{method}").check()
    return f"{output}#{method}"


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_a_composite_of_masks_rebuilds_routes_answers_and_is_exported(
    method: str, repository: Path, tmp_path: Path
) -> None:
    uri = to_lab(method, repository, tmp_path / "store")
    reader = BuildReader(uri)
    name = next(found for found in reader.names("delta") if found.endswith("q_proj.weight"))
    base, delta = reader.read(name, "base").float(), reader.read(name, "delta").float()
    factors = [reader.rescaler(expert) for expert in reader.expert_names]
    assert (method == "emr") == any(factor != 1 for factor in factors)
    masks = [
        unpack_mask(reader.read_packed_mask(name, expert), base.shape).float()
        for expert in reader.expert_names
    ]
    for expert, mask, factor in zip(reader.expert_names, masks, factors, strict=True):
        expected = (base + factor * mask * delta).to(reader.dtype)
        assert rebuild_weight(reader, name, expert=expert).equal(expected)
    mean = sum(factor * mask for factor, mask in zip(factors, masks, strict=True)) / len(masks)
    assert text_weight(reader, name).equal((base + mean * delta).to(reader.dtype))
    export(uri, tmp_path / "image", expert="image")
    exported = load_file(tmp_path / "image" / "model.safetensors")
    assert exported[reader.manifest.rename(name, expert="image")].equal(
        rebuild_weight(reader, name, expert="image")
    )

    composite = load_composite(uri, policy="resident")
    linear = composite.language_model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(linear, RoutedLinear)
    for index, expert in enumerate(reader.expert_names):
        assert linear.modality_weight(index).equal(rebuild_weight(reader, name, expert=expert))
    picture = Part("image", repository / "examples" / "lab" / "samples" / "image_seven_light.png")
    question = "which digit is in the image ?"
    retained = load_composite(uri, mode="retention", expert="image")
    assert retained.generate(retained.prompt(question, [picture]), max_new_tokens=4) == "seven"


def refused(raw: dict[str, Any], match: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_recipe(raw, folder=folder)


@pytest.mark.parametrize("method", method_names())
def test_a_parameter_that_a_method_does_not_have_is_refused(method: str, tmp_path: Path) -> None:
    experts = {
        f"e{index}": {"path": f"{index}", "modality": "image"}
        for index in range(find_method(method).max_experts or 2)
    }
    raw = {"base": "base", "method": method, "output": "store", "experts": experts}
    refused(raw | {"sharpness": 3}, rf"sharpness: unknown key for method '{method}'", tmp_path)
    experts["e0"]["sharpness"] = "3"
    refused(raw, rf"experts\.e0\.sharpness: unknown key for method '{method}'", tmp_path)


@pytest.mark.parametrize(
    "method", [name for name in method_names() if find_method(name).needs_base]
)
def test_a_missing_base_is_refused_where_a_method_needs_one(method: str, tmp_path: Path) -> None:
    found = find_method(method)
    required = {
        key: 0.5
        for key, field in found.parameters_model.model_fields.items()
        if field.is_required()
    }
    experts = {
        f"e{index}": {"path": f"{index}", "modality": "image"}
        for index in range(found.max_experts or 2)
    }
    refused(
        {"method": method, "output": "store", "experts": experts} | required,
        "base: is missing",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        ("ties", {"count": "exact"}, "count: 'exact' needs 'scope: tensor'"),
        (
            "ties",
            {"reduction": "median"},
            "reduction: should be 'mean', 'sum' or 'max', got 'median'",
        ),
        (
            "della",
            {"density": 0.9},
            r"epsilon: with density 0\.9 keep probabilities would go from 0\.75 to 1\.05",
        ),
        ("breadcrumbs", {"gamma": -1}, "gamma: "),
        ("dare_linear", {"density": 0}, r"density: expected a number in \(0, 1\], got 0"),
        ("sce", {"select_topk": 2}, "select_topk: "),
    ],
)
def test_numbers_outside_a_methods_range_are_refused(
    method: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    experts = {name: {"path": name, "modality": "image"} for name in ("a", "b")}
    refused(
        {"base": "base", "method": method, "output": "store", "experts": experts} | changes,
        match,
        tmp_path,
    )


def test_weights_that_cancel_cannot_be_normalised(tmp_path: Path) -> None:
    experts = {
        "a": {"path": "a", "modality": "image", "weight": 1},
        "b": {"path": "b", "modality": "image", "weight": -1},
    }
    refused(
        {"method": "linear", "output": "store", "experts": experts},
        "the weights sum to 0",
        tmp_path,
    )


def test_linear_does_without_a_base(lab: Any) -> None:
    lab.make_base()
    experts = {}
    for seed, name in enumerate(("one", "two")):
        tensors = {
            key.removeprefix("language_model."): value
            for key, value in lab.expert_tensors(seed, extra_rows=0).items()
            if "language" in key
        }
        lab.write(name, tensors, lab.config)
        experts[name] = {"path": name, "modality": "text"}
    raw = {"method": "linear", "output": "store", "experts": experts, "dtype": "float32"}
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    reader = BuildReader(str(lab.folder / "store"))
    for name in lab.base:
        one, two = (
            lab.expert_tensors(seed, extra_rows=0)["language_model." + name].float()
            for seed in (0, 1)
        )
        torch.testing.assert_close(reader.read(name, "merged"), (one + two) / 2)
