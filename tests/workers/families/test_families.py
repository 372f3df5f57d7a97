"""Families whose tensor names differ from LLaMA's: planned, merged, loaded, placed and split."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    EXPERTS,
    Naive,
    build,
    build_adapters,
    build_masks,
    is_layer_matrix,
    make_model,
    write_family,
)
from rank_runs import case, run_and_check
from rank_script import held_bytes
from safetensors.torch import load_file

from mmerge.manifests.errors import CheckpointError, PlacementError
from mmerge.pipeline import Part, load_composite
from mmerge.workers.composite.placement_planner import plan_placement
from mmerge.workers.families.generic import GenericFamily
from mmerge.workers.families.registry import find_family, list_families, role_of
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import text_weight

NEW_FAMILIES = ("phi3", "gpt_neox", "starcoder2")
DENSITY = 0.7
MODALITIES = {name: {"path": name, "modality": name} for name in EXPERTS}
GB = 10**9
PROMPT = [
    Part.text("w5 w6"),
    Part("image", torch.randn(5, 32, generator=torch.Generator().manual_seed(1))),
    Part.text("w7"),
    Part("audio", torch.randn(3, 32, generator=torch.Generator().manual_seed(2))),
    Part.text("w8 w9"),
]


def shapes_of(architecture: str) -> dict[str, tuple[int, ...]]:
    renamed = {"lm_head.weight": "embed_out.weight"} if architecture == "gpt_neox" else {}
    parameters = make_model(architecture).named_parameters()
    return {renamed.get(name, name): tuple(value.shape) for name, value in parameters}


def read_task_vectors(folder: Path, name: str) -> list[torch.Tensor]:
    base = load_file(folder / "base" / "model.safetensors")[name]
    return [load_file(folder / expert / "model.safetensors")[name] - base for expert in EXPERTS]


def naive_trim(delta: torch.Tensor) -> torch.Tensor:
    """Keep every entry at or above the magnitude of ascending rank N − int(density·N)."""
    count = delta.numel()
    rank = count - int(DENSITY * count)
    threshold = delta.abs().flatten().sort().values[rank - 1]
    return torch.where(delta.abs() >= threshold, delta, torch.zeros(()))


def naive_ties(deltas: list[torch.Tensor], *, reduction: str) -> torch.Tensor:
    """TIES of one tensor: trim, elect the sign of the sum, sum or mean of those that agree."""
    trimmed = torch.stack([naive_trim(delta) for delta in deltas])
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    total = (trimmed * agrees).sum(0)
    return total if reduction == "sum" else total / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *NEW_FAMILIES])
def test_the_names_of_real_classes_choose_their_family(architecture: str) -> None:
    shapes = shapes_of(architecture)
    family = find_family(shapes, {"model_type": architecture}, where="base")
    assert family.name == (architecture if architecture in NEW_FAMILIES else "llama")
    matrices = {name for name, shape in shapes.items() if ".layers." in name and len(shape) == 2}
    assert {name for name, shape in shapes.items() if family.is_projection(name, shape)} == matrices
    roles = {family.role_of(name) for name in shapes}
    assert {"embedding", "final_norm", "down"} <= roles
    assert ("head" in roles) == (architecture != "qwen2")


def test_fused_rows_of_an_unknown_model_type_are_no_known_family() -> None:
    shapes = shapes_of("gpt_neox")
    config = {"model_type": "someone_elses", "vocab_size": 42}
    assert isinstance(find_family(shapes, config, where="base"), GenericFamily)


def test_families_agree_on_the_role_of_equal_names() -> None:
    names = {name for architecture in NEW_FAMILIES for name in shapes_of(architecture)}
    for name in names | set(shapes_of("llama")):
        roles = {family.role_of(name) for family in list_families()} - {None}
        assert len(roles) <= 1, name
    assert role_of("embed_out.weight") == "head"
    assert role_of("model.layers.0.input_layernorm.weight") is None


@pytest.mark.parametrize("architecture", NEW_FAMILIES)
def test_linear_merges_every_projection_and_nothing_else(tmp_path: Path, architecture: str) -> None:
    tensors = write_family(tmp_path, architecture)
    recipe = {"method": "ties", "merge": "linear", "density": DENSITY, "scope": "tensor"}
    uri = build(tmp_path, recipe | {"scale": 0.5, "experts": MODALITIES})
    reader = BuildReader(uri)
    assert set(reader.names("merged")) == {
        name for name, value in tensors.items() if is_layer_matrix(name, value)
    }
    for name, base in tensors.items():
        expected = base
        if is_layer_matrix(name, base):
            deltas = read_task_vectors(tmp_path, name)
            expected = base + 0.5 * naive_ties(deltas, reduction="mean")
        torch.testing.assert_close(text_weight(reader, name), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", NEW_FAMILIES)
def test_mmer_builds_equal_the_naive_arithmetic_and_rebuild_each_expert(
    tmp_path: Path, architecture: str
) -> None:
    tensors = write_family(tmp_path, architecture)
    recipe = {"method": "mmer", "density": DENSITY, "scope": "tensor", "mask_scale": 0.75}
    uri = build(tmp_path, recipe | {"experts": MODALITIES})
    reader = BuildReader(uri)
    retained = load_composite(uri, mode="retention", expert="audio").language_model
    parameters = dict(retained.named_parameters())
    for name, base in tensors.items():
        deltas = read_task_vectors(tmp_path, name)
        merged = naive_ties(deltas, reduction="sum")
        torch.testing.assert_close(reader.read(name, "delta"), merged, rtol=1e-6, atol=1e-6)
        trimmed = naive_trim(deltas[EXPERTS.index("audio")])
        mask = (trimmed.abs() >= 0.75 * 0.5 * merged.abs()) & (trimmed * merged > 0)
        rebuilt = parameters[reader.family.parameter_name(name)]
        torch.testing.assert_close(rebuilt, base + mask * merged, rtol=1e-6, atol=1e-6)


class Composites:
    """One composite of masks per architecture, built once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uris: dict[str, str] = {}

    def uri(self, architecture: str) -> str:
        if architecture not in self._uris:
            folder = self._folder / architecture
            folder.mkdir()
            self._uris[architecture] = build_masks(folder, architecture)
        return self._uris[architecture]


@pytest.fixture(scope="module")
def composites(tmp_path_factory: pytest.TempPathFactory) -> Composites:
    return Composites(tmp_path_factory.mktemp("composites"))


@pytest.mark.parametrize("policy", ["packed", "resident"])
@pytest.mark.parametrize("architecture", [*NEW_FAMILIES, "phi"])
def test_expansion_equals_a_naive_forward_token_by_token(
    composites: Composites, architecture: str, policy: Any
) -> None:
    uri = composites.uri(architecture)
    composite = load_composite(uri, policy=policy)
    embeds, ids = composite.embed(PROMPT)
    naive = Naive(uri, architecture)
    torch.testing.assert_close(
        composite.logits(PROMPT), naive.logits(embeds, ids.tolist()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("architecture", NEW_FAMILIES)
def test_adapters_expand_as_a_naive_forward_token_by_token(
    tmp_path: Path, architecture: str
) -> None:
    uri = build_adapters(tmp_path, architecture)
    composite = load_composite(uri)
    embeds, ids = composite.embed(PROMPT)
    naive = Naive(uri, architecture)
    torch.testing.assert_close(
        composite.logits(PROMPT), naive.logits(embeds, ids.tolist()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("policy", ["packed", "resident"])
@pytest.mark.parametrize("architecture", ["llama", *NEW_FAMILIES, "phi", "opt"])
def test_placement_plans_the_bytes_that_the_loader_holds(
    composites: Composites, architecture: str, policy: Any
) -> None:
    uri = composites.uri(architecture)
    memory = plan_placement(uri, devices=[GB], policy=policy, device_type="cpu").stages[0].memory
    composite = load_composite(uri, policy=policy)
    buffers = composite.language_model.get_decoder().named_modules()
    rotary = sum(
        buffer.numel() * buffer.element_size()
        for name, module in buffers
        if name.startswith("rotary_emb")
        for buffer in {id(value): value for value in module.buffers(recurse=False)}.values()
    )
    planned = memory.weights + memory.task_vector + memory.masks + memory.modalities
    assert planned == held_bytes(composite) - rotary


@pytest.mark.parametrize("architecture", NEW_FAMILIES)
def test_layers_on_two_stages_give_the_logits_of_one(
    composites: Composites, architecture: str
) -> None:
    uri = composites.uri(architecture)
    placement = plan_placement(uri, devices=[GB, GB], by="layers", device_type="cpu")
    for name in BuildReader(uri).llm_names():
        assert sum(stage.holds(name) for stage in placement.stages) == 1
    spread = load_composite(uri, placement=placement)
    torch.testing.assert_close(spread.logits(PROMPT), load_composite(uri).logits(PROMPT))


def test_two_ranks_give_the_logits_of_one_process(composites: Composites, tmp_path: Path) -> None:
    cases = [case(composites.uri(architecture)) for architecture in NEW_FAMILIES]
    run_and_check(cases, tmp_path, 2)


def test_an_unknown_family_refuses_linear_and_names_the_tensors(tmp_path: Path) -> None:
    write_family(tmp_path, "opt")
    with pytest.raises(CheckpointError) as caught:
        build(tmp_path, {"method": "ties", "merge": "linear", "experts": MODALITIES})
    message = str(caught.value)
    assert "merge: 'linear' merges the Linear layers of known model families" in message
    assert "'opt'" in message
    assert "model.decoder.layers.0.fc1.weight" in message
    assert "and 9 more" in message


@pytest.mark.parametrize("by", ["tensor", "layers"])
def test_an_unknown_family_is_placed_on_one_device_only(composites: Composites, by: Any) -> None:
    uri = composites.uri("phi")
    message = r"model\.layers\.0\.input_layernorm\.bias \(32,\): no model family knows this tensor"
    with pytest.raises(PlacementError, match=message):
        plan_placement(uri, devices=[GB, GB], by=by, device_type="cpu")


def test_layers_of_other_names_are_refused_by_a_tensor_of_theirs() -> None:
    shapes = {"transformer.wte.weight": (42, 32), "transformer.h.0.mlp.c_fc.weight": (32, 48)}
    with pytest.raises(CheckpointError, match=r"'gpt2' is not supported.*transformer\.h\.0\.mlp"):
        find_family(shapes, {"model_type": "gpt2"}, where="base")


def test_an_embedding_that_shapes_do_not_tell_is_refused_with_its_candidates() -> None:
    shapes = {
        "model.tokens.weight": (42, 32),
        "model.positions.weight": (42, 32),
        "model.layers.0.mlp.w1.weight": (48, 32),
    }
    with pytest.raises(CheckpointError, match=r"candidates: model\.positions\.weight, model\.tok"):
        find_family(shapes, {"model_type": "new", "vocab_size": 42}, where="base")


def test_the_encoder_of_an_unknown_multimodal_base_is_not_its_language_model() -> None:
    shapes = {
        "audio_tower.embed_positions.weight": (100, 32),
        "audio_tower.layers.0.fc1.weight": (48, 32),
        "language_model.model.embed.weight": (42, 32),
        "language_model.model.layers.0.moe.weight": (48, 32),
    }
    family = find_family(shapes, {"model_type": "new", "vocab_size": 42}, where="base")
    assert family.find_prefixes(shapes) == ["language_model.model."]
    assert family.body == "language_model.model."


def test_listing_families_imports_no_torch() -> None:
    code = (
        "import sys; from mmerge.workers.families.registry import list_families; list_families();"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
