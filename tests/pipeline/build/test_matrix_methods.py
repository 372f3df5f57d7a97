"""Recipes of the slerp family, whole-matrix methods, AdaMMS and Neuron-Fusion: what they refuse,
and bytes that depend on nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmerge.manifests.errors import CheckpointError, MmergeError, RecipeError
from mmerge.pipeline import make_plan, parse_recipe, read_recipe, run
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import text_weight

METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "arcee_fusion": {},
    "nearswap": {"t": 0.01},
    "tsv": {},
    "iso_c": {},
    "wudi": {"iterations": 5},
    "optmerge": {"iterations": 5},
    "swudi": {},
    "aswudi": {},
    "adamms": {"alpha": 0.3},
    "neuron_fusion": {"restore": True},
}
ONE_EXPERT = ("arcee_fusion", "nearswap", "neuron_fusion")


def make_raw(lab: Any, method: str, num_experts: int, **numbers: Any) -> dict[str, Any]:
    names = ("image", "audio", "video")[:num_experts]
    experts = {name: {"path": name, "modality": name} for name in names}
    return (
        {"name": "tiny", "base": "base", "method": method, "output": "store", "experts": experts}
        | METHODS[method]
        | numbers
    )


def parse(lab: Any, raw: dict[str, Any]) -> Any:
    return parse_recipe(raw, folder=lab.folder)


@pytest.mark.parametrize(
    ("method", "num_experts", "numbers", "message"),
    [
        ("slerp", 3, {}, "'slerp' takes 1 to 2, the recipe has 3"),
        ("nuslerp", 3, {}, "'nuslerp' takes 2, the recipe has 3"),
        ("nuslerp", 1, {}, "'nuslerp' takes 2, the recipe has 1"),
        ("model_stock", 1, {}, "'model_stock' takes at least 2, the recipe has 1"),
        (
            "arcee_fusion",
            2,
            {},
            "'arcee_fusion' takes 1 to 1|'arcee_fusion' takes 1, the recipe has 2",
        ),
        ("nearswap", 2, {}, "'nearswap' takes 1"),
        ("adamms", 3, {}, "'adamms' takes 2, the recipe has 3"),
        ("neuron_fusion", 2, {}, "'neuron_fusion' takes 1"),
        ("slerp", 2, {"t": 1.5}, "t: should be less than or equal to 1, got 1.5"),
        ("nearswap", 1, {"t": 0}, "t: should be greater than 0, got 0"),
        ("tsv", 2, {"density": 0.2}, "density: unknown key for method 'tsv'"),
        ("aswudi", 2, {"rank_rule": "cumvar_2"}, "rank_rule: expected one of none, stable_rank"),
        ("neuron_fusion", 1, {"keep_ratio": 0}, "keep_ratio: should be greater than 0"),
    ],
)
def test_a_recipe_that_does_not_fit_its_method_is_refused(
    lab: Any, method: str, num_experts: int, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(lab, make_raw(lab, method, num_experts, **numbers))


def test_slerp_needs_its_t(lab: Any) -> None:
    raw = make_raw(lab, "slerp", 2)
    del raw["t"]
    with pytest.raises(RecipeError, match="t: is missing"):
        parse(lab, raw)


@pytest.mark.parametrize("method", ["tsv", "model_stock", "neuron_fusion", "nearswap", "swudi"])
def test_a_method_on_task_vectors_needs_a_base(lab: Any, method: str) -> None:
    raw = make_raw(lab, method, 1 if method in ONE_EXPERT else 2)
    del raw["base"]
    with pytest.raises(RecipeError, match="base: is missing"):
        parse(lab, raw)


@pytest.mark.parametrize(
    ("method", "num_experts"), [("slerp", 1), ("nuslerp", 2), ("multislerp", 3)]
)
def test_a_sphere_around_a_base_needs_one(lab: Any, method: str, num_experts: int) -> None:
    raw = make_raw(lab, method, num_experts)
    del raw["base"]
    with pytest.raises(RecipeError, match="base"):
        parse(lab, raw)
    if method != "slerp":
        assert not parse(lab, raw | {"origin": "zero"}).has_base


def test_weights_that_add_up_to_nothing_are_refused(lab: Any) -> None:
    raw = make_raw(lab, "multislerp", 2)
    raw["experts"]["image"]["weight"], raw["experts"]["audio"]["weight"] = 1.0, -1.0
    with pytest.raises(RecipeError, match="add up to 0"):
        parse(lab, raw)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_no_block_size_threads_or_pieces(lab: Any, method: str) -> None:
    lab.config |= {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 600}
    lab.make_all()
    num_experts = 1 if method in ONE_EXPERT else 2
    found = []
    for output, block_entries, max_shard_bytes, threads in (
        ("a", 1 << 18, 1 << 31, 1),
        ("b", 1 << 16, 20_000, 2),
    ):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        raw = make_raw(lab, method, num_experts, output=output)
        run(
            make_plan(
                read_recipe(lab.write_recipe(raw)),
                block_entries=block_entries,
                max_shard_bytes=max_shard_bytes,
            )
        )
        torch.set_num_threads(before)
        reader = BuildReader(str(lab.folder / output))
        found.append({name: text_weight(reader, name) for name in lab.base})
    different = [name for name in lab.base if not torch.equal(found[0][name], found[1][name])]
    assert not different


@pytest.mark.ray
def test_workers_of_ray_write_the_bytes_of_one_process(lab: Any) -> None:
    lab.config |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    lab.make_all()
    executor = RayExecutor(num_workers=2)
    try:
        for method in ("tsv", "swudi", "optmerge", "karcher", "neuron_fusion"):
            raw = make_raw(lab, method, 1 if method in ONE_EXPERT else 2)
            serial = run(
                make_plan(read_recipe(lab.write_recipe(raw | {"output": f"{method}-serial"})))
            )
            parallel = run(
                make_plan(read_recipe(lab.write_recipe(raw | {"output": f"{method}-ray"}))),
                executor=executor,
            )
            assert serial.manifest is not None
            assert parallel.manifest is not None
            assert [entry.digest for entry in serial.manifest.entries] == [
                entry.digest for entry in parallel.manifest.entries
            ], method
    finally:
        executor.close()


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "karcher", "adamms"])
def test_methods_without_a_base_run_without_one(lab: Any, method: str) -> None:
    lab.make_all()
    raw = make_raw(lab, method, 2, **({"origin": "zero"} if method == "nuslerp" else {}))
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    with_base = BuildReader(str(lab.folder / "store"))
    del raw["base"]
    if method == "adamms":  # it keeps embeddings whole, and cannot tell that this is none
        with pytest.raises(CheckpointError, match="list it under 'carry'"):
            run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "bare"}))))
        raw["carry"] = ["multi_modal_projector.*"]
    report = run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "bare"}))))
    assert report.manifest is not None
    reader = BuildReader(str(lab.folder / "bare"))
    name = "layers.1.mlp.up_proj.weight"
    own = next(found for found in reader.llm_names() if found.endswith(name))
    assert torch.equal(text_weight(reader, own), text_weight(with_base, f"model.{name}"))


def neuron_build(
    lab: Any, **numbers: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The merged model, base and expert of a Neuron-Fusion recipe, in float32."""
    lab.dtype = torch.float32
    lab.make_base()
    lab.make_expert("image", 0)
    run(make_plan(read_recipe(lab.write_recipe(make_raw(lab, "neuron_fusion", 1, **numbers)))))
    reader = BuildReader(str(lab.folder / "store"))
    expert = {
        name.removeprefix("language_model."): value for name, value in lab.expert_tensors(0).items()
    }
    return (
        {name: text_weight(reader, name) for name in lab.base},
        lab.base,
        {name: expert[name][: len(lab.base[name])] for name in lab.base},
    )


@pytest.mark.parametrize(
    "numbers",
    [{"keep_ratio": 1.0}, {"suppress": 1.0}, {"unit": "row", "keep_ratio": 1.0, "scope": "model"}],
)
def test_neuron_fusion_that_suppresses_nothing_is_the_expert(
    lab: Any, numbers: dict[str, Any]
) -> None:
    merged, _, expert = neuron_build(lab, **{"restore": False, **numbers})
    for name, value in expert.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "tensor", "model"])
@pytest.mark.parametrize("unit", ["neuron", "row"])
def test_neuron_fusion_keeps_the_share_it_is_asked_for(lab: Any, unit: str, scope: str) -> None:
    merged, base, _ = neuron_build(lab, unit=unit, scope=scope, keep_ratio=0.25, restore=False)
    down = [
        int((merged[name] != base[name]).any(dim=0).sum())
        for name in (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    ]
    gate = [
        int((merged[name] != base[name]).any(dim=1).sum())
        for name in (f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1))
    ]
    if unit == "row":
        rows = [
            int((merged[name] != base[name]).any(dim=1).sum())
            for name in base
            if "_proj" in name and "q_proj" not in name and "k_proj" not in name
        ]
        assert sum(rows) == pytest.approx(0.25 * 2 * (24 + 24 + 16 + 8 + 16), abs=10)
    elif scope == "model":
        assert sum(down) == sum(gate) == 12
    else:
        assert down == gate == [6, 6]


def test_layers_can_keep_different_shares_where_neurons_compete_in_their_layer_only(
    lab: Any,
) -> None:
    shares = [{"layers": [0, 0], "value": 0.25}, {"value": 0.5}]
    merged, base, _ = neuron_build(lab, keep_ratio=shares, restore=False)
    kept = [
        int((merged[name] != base[name]).any(dim=1).sum())
        for name in (f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1))
    ]
    assert kept == [6, 12]
    with pytest.raises(RecipeError, match="whose neurons compete"):
        neuron_build(lab, keep_ratio=shares, scope="model")


def test_neuron_fusion_restores_the_norm_of_every_matrix(lab: Any) -> None:
    merged, base, expert = neuron_build(lab, suppress=0.3, query_key="neuron", restore=True)
    for name in base:
        if "_proj" in name:
            assert float((merged[name] - base[name]).norm()) == pytest.approx(
                float((expert[name] - base[name]).norm()), rel=1e-4
            )


def test_embeddings_head_and_norms_are_whose_the_recipe_says(lab: Any) -> None:
    merged, base, expert = neuron_build(
        lab, embeddings="base", norms="base", query_key="base", restore=False
    )
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        base["model.layers.0.self_attn.q_proj.weight"],
    )
    assert torch.equal(merged["lm_head.weight"], expert["lm_head.weight"])


def test_a_head_dimension_that_does_not_divide_the_heads_is_refused(lab: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no heads of 5 entries.*head_dim"):
        neuron_build(lab, head_dim=5)


def test_whole_matrix_methods_leave_other_tensors_to_the_base_or_to_task_arithmetic(
    lab: Any,
) -> None:
    lab.dtype = torch.float32
    lab.make_all()
    found = {}
    for others in ("base", "task_arithmetic"):
        run(
            make_plan(
                read_recipe(
                    lab.write_recipe(
                        make_raw(lab, "iso_c", 2, others=others, output=others, scale=0.5)
                    )
                )
            )
        )
        found[others] = text_weight(BuildReader(str(lab.folder / others)), "model.norm.weight")
    tuned = [lab.expert_tensors(seed)["language_model.model.norm.weight"] for seed in (0, 1)]
    base = lab.base["model.norm.weight"]
    assert torch.equal(found["base"], base)
    torch.testing.assert_close(
        found["task_arithmetic"],
        base + 0.5 * (tuned[0] + tuned[1] - 2 * base),
        rtol=1e-6,
        atol=1e-6,
    )


def test_only_matrices_are_held_whole_in_memory(lab: Any) -> None:
    lab.make_all()
    plan = make_plan(read_recipe(lab.write_recipe(make_raw(lab, "tsv", 2))))
    held = {
        tensor.name: tensor.granularity for shard in plan.merge_shards for tensor in shard.tensors
    }
    assert held["model.embed_tokens.weight"] == "entry"
    assert held["model.layers.0.mlp.up_proj.weight"] == "tensor"
    assert all(len(shard.tensors) == 1 for shard in plan.merge_shards)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(lab: Any) -> None:
    with pytest.raises(MmergeError, match="this machine has no CUDA device for 'cuda'"):
        run(
            make_plan(
                read_recipe(lab.write_recipe(lab.make_all() | {"method": "tsv", "device": "cuda"}))
            )
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["tsv", "iso_c", "wudi", "optmerge", "swudi", "aswudi"])
def test_a_gpu_merges_matrices_as_the_cpu_does(lab: Any, method: str) -> None:
    raw = lab.make_all() | {"method": method, "dtype": "float32"}
    builds = [
        run(
            make_plan(read_recipe(lab.write_recipe(raw | {"output": device, "device": device})))
        ).build
        for device in ("cpu", "cuda")
    ]
    assert builds[0] != builds[1], "the device is part of what a build is"
    cpu, cuda = (BuildReader(str(lab.folder / device)) for device in ("cpu", "cuda"))
    for name in lab.base:
        torch.testing.assert_close(
            cuda.read(name, "merged"), cpu.read(name, "merged"), rtol=1e-3, atol=1e-4
        )
