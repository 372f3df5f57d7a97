"""Every family of models over its plain language model: merged, exported, loaded by transformers.

Expected weights come from a plain torch computation over the parameters in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import export, make_plan, read_recipe, run
from tests.model_configs import LANGUAGE_MODELS, MULTIMODAL, MultimodalFamily
from tests.model_families import (
    give_language_model,
    language_parameters,
    make_base,
    make_language_model,
    make_multimodal,
    tune,
)

DENSITY, SCALE = 0.6, 0.75
REFUSED_AS_BASE = {"Kimi K2.5": r"none of its tensors is named …layers\.NUMBER\.…"}

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_recipe(folder: Path, method: str, *, modality: str = "image") -> Path:
    recipe = {
        "name": method,
        "base": "base",
        "method": method,
        "density": DENSITY,
        "output": "store",
        "experts": {
            "one": {"path": "expert0", "modality": modality},
            "two": {"path": "expert1", "modality": modality},
        },
    }
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def build(folder: Path, method: str) -> str:
    return run(make_plan(read_recipe(write_recipe(folder, method)))).uri


def trim(task_vectors: list[State], names: list[str]) -> list[State]:
    """Return each expert's task vector with its smallest entries zeroed, over the whole model."""
    trimmed = []
    for vector in task_vectors:
        magnitudes = torch.cat([vector[name].flatten().abs() for name in names])
        rank = len(magnitudes) - int(DENSITY * len(magnitudes))
        threshold = torch.kthvalue(magnitudes, rank).values
        trimmed.append(
            {
                name: torch.where(vector[name].abs() >= threshold, vector[name], 0.0)
                for name in names
            }
        )
    return trimmed


def merge_naively(base: State, experts: list[State], method: str) -> tuple[State, list[State]]:
    """Return the weights for text tokens and those of every expert (TIES, MMER)."""
    names = list(base)
    vectors = [{name: expert[name] - base[name] for name in names} for expert in experts]
    kept = trim(vectors, names)
    text: State = {}
    rebuilt: list[State] = [{} for _ in experts]
    for name in names:
        parts = [vector[name] for vector in kept]
        sign = torch.stack(parts).sum(0).sign()
        agreeing = [torch.where((part.sign() == sign) & (sign != 0), part, 0.0) for part in parts]
        total = torch.stack(agreeing).sum(0)
        if method == "ties":
            counts = torch.stack([(part != 0).float() for part in agreeing]).sum(0)
            text[name] = base[name] + total / counts.clamp(min=1)
            for state in rebuilt:
                state[name] = text[name]
            continue
        masks = [
            (part.abs() >= SCALE * 0.5 * total.abs()) & (part.sign() == total.sign()) & (total != 0)
            for part in parts
        ]
        for state, mask in zip(rebuilt, masks, strict=True):
            state[name] = base[name] + mask * total
        text[name] = base[name] + sum(mask.float() for mask in masks) / len(masks) * total
    return text, rebuilt


def load_strictly(model_class: Any, folder: Path) -> Any:
    """Load an export with transformers; no key may be missing, unexpected or of another shape."""
    model, info = model_class.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
    )
    problems = {key: value for key, value in info.items() if value and key != "mismatched_keys"}
    assert not problems, problems
    return model


def assert_equal(actual: State, expected: State) -> None:
    assert set(expected) <= set(actual)
    for name, value in expected.items():
        rows = actual[name][: len(value)] if value.ndim else actual[name]
        torch.testing.assert_close(
            rows, value, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_exports(
    folder: Path,
    base: Any,
    experts: list[Any],
    read: Callable[[Any], State],
    *,
    classes: tuple[Any, Any],
    methods: tuple[str, ...] = ("ties", "mmer"),
) -> None:
    """Build with each method and compare every export with the naive computation."""
    start = {name: value.clone() for name, value in read(base).items()}
    tuned = [
        {name: read(expert)[name][: len(v)] for name, v in start.items()} for expert in experts
    ]
    for method in methods:
        uri = build(folder, method)
        text, rebuilt = merge_naively(start, tuned, method)
        export(uri, folder / method)
        assert_equal(read(load_strictly(classes[0], folder / method)), text)
        for index, name in enumerate(("one", "two")):
            export(uri, folder / f"{method}-{name}", expert=name)
            loaded = load_strictly(classes[1], folder / f"{method}-{name}")
            assert_equal(read(loaded), rebuilt[index])
            assert_others_are_kept(loaded, experts[index], read)


def assert_others_are_kept(loaded: Any, expert: Any, read: Callable[[Any], State]) -> None:
    """Encoders, connectors and all else outside the language model are the expert's own."""
    merged = {value.data_ptr() for value in read(expert).values()}
    own = {name: v for name, v in expert.state_dict().items() if v.data_ptr() not in merged}
    assert_equal(loaded.state_dict(), own)


def write_multimodal(family: MultimodalFamily, folder: Path) -> tuple[Any, list[Any]]:
    base = make_base(family)
    base.save_pretrained(folder / "base")
    experts = []
    for number in range(2):
        expert = make_multimodal(family, seed=11 + number)
        give_language_model(base, expert, seed=100 + number)
        expert.save_pretrained(folder / f"expert{number}")
        experts.append(expert)
    return base, experts


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_model_is_merged_over_its_plain_language_model(
    name: str, tmp_path: Path
) -> None:
    family = MULTIMODAL[name]
    base, experts = write_multimodal(family, tmp_path)
    classes = (transformers.AutoModelForCausalLM, getattr(transformers, family.class_name))
    check_exports(tmp_path, base, experts, language_parameters_of(base), classes=classes)


def language_parameters_of(base: Any) -> Callable[[Any], State]:
    """Return a reader of the language model that leaves out what the base lacks."""
    names = set(language_parameters(base))
    return lambda model: {k: v for k, v in language_parameters(model).items() if k in names}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_plain_language_models_are_merged(kind: str, tmp_path: Path) -> None:
    base = make_language_model(kind)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    check_exports(tmp_path, base, experts, language_parameters, classes=classes)


def write_all(folder: Path, base: Any, experts: list[Any]) -> None:
    base.save_pretrained(folder / "base")
    for number, expert in enumerate(experts):
        expert.save_pretrained(folder / f"expert{number}")


def all_parameters(model: Any) -> State:
    """Return every float tensor of a model once, tied ones under their first name."""
    states: State = {}
    pointers: set[int] = set()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.data_ptr() not in pointers:
            pointers.add(value.data_ptr())
            states[name] = value
    return states


@pytest.mark.parametrize("name", [name for name in MULTIMODAL if name not in REFUSED_AS_BASE])
def test_fine_tunes_of_one_multimodal_model_are_merged(name: str, tmp_path: Path) -> None:
    family = MULTIMODAL[name]
    base = make_multimodal(family, seed=5)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    model_class = getattr(transformers, family.class_name)
    classes = (model_class, model_class)
    check_exports(tmp_path, base, experts, all_parameters, classes=classes, methods=("ties",))


@pytest.mark.parametrize("name", REFUSED_AS_BASE)
def test_a_base_whose_layers_cannot_be_told_is_refused(name: str, tmp_path: Path) -> None:
    base = make_multimodal(MULTIMODAL[name], seed=5)
    write_all(tmp_path, base, [base, base])
    with pytest.raises(CheckpointError, match=REFUSED_AS_BASE[name]):
        make_plan(read_recipe(write_recipe(tmp_path, "ties")))


@pytest.mark.parametrize("name", ["LLaVA 1.5", "Qwen2.5-VL", "Qwen2-Audio", "PaliGemma"])
def test_files_with_names_of_two_generations_are_merged(name: str, tmp_path: Path) -> None:
    # save_pretrained writes the names of the Hub; other tools write those in memory.
    family = MULTIMODAL[name]
    base = make_multimodal(family, seed=5)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    in_memory = {key: value.clone() for key, value in experts[0].state_dict().items()}
    if getattr(experts[0].config, "tie_word_embeddings", False):
        del in_memory["lm_head.weight"]
    assert set(in_memory) != set(load_file(tmp_path / "expert0" / "model.safetensors"))
    save_file(in_memory, tmp_path / "expert0" / "model.safetensors", metadata={"format": "pt"})
    model_class = getattr(transformers, family.class_name)
    classes = (model_class, model_class)
    check_exports(tmp_path, base, experts, all_parameters, classes=classes, methods=("ties",))


def save_in_memory_form(model: Any, folder: Path) -> None:
    """Write a checkpoint with the names and shapes that its class has in memory: experts fused."""
    model.save_pretrained(folder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(state) != set(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_expert_with_fused_experts_is_merged_over_a_base_with_separate_ones(
    kind: str, tmp_path: Path
) -> None:
    base = make_language_model(kind)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    save_in_memory_form(experts[0], tmp_path / "expert0")
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    check_exports(tmp_path, base, experts, language_parameters, classes=classes)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_expert_with_separate_experts_is_merged_over_a_base_with_fused_ones(
    kind: str, tmp_path: Path
) -> None:
    base = make_language_model(kind)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    save_in_memory_form(base, tmp_path / "base")
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForCausalLM)
    check_exports(tmp_path, base, experts, language_parameters, classes=classes)


def test_a_text_expert_is_merged_over_a_multimodal_base_of_another_layout(tmp_path: Path) -> None:
    family = MULTIMODAL["Qwen3-VL-MoE"]
    base = make_multimodal(family, seed=5)
    start = language_parameters(base)
    experts = []
    for number in range(2):
        expert = make_language_model(family.base, rows=len(start["embed_tokens.weight"]))
        give_language_model(base, expert, seed=30 + number)
        expert.save_pretrained(tmp_path / f"expert{number}")
        experts.append(expert)
    base.save_pretrained(tmp_path / "base")
    recipe = yaml.safe_load(write_recipe(tmp_path, "ties").read_text())
    recipe["carry"] = ["model.visual.*"]
    (tmp_path / "ties.yaml").write_text(yaml.safe_dump(recipe))
    export(run(make_plan(read_recipe(tmp_path / "ties.yaml"))).uri, tmp_path / "merged")
    model = load_strictly(getattr(transformers, family.class_name), tmp_path / "merged")
    vectors = [language_parameters(expert) for expert in experts]
    expected, _ = merge_naively({k: v.clone() for k, v in start.items()}, vectors, "ties")
    assert_equal(language_parameters(model), expected)


def test_files_of_one_class_with_transposed_and_plain_experts_meet(tmp_path: Path) -> None:
    family = MULTIMODAL["Qwen3-VL-MoE"]
    base = make_multimodal(family, seed=5)
    experts = [tune(base, seed=21), tune(base, seed=22)]
    write_all(tmp_path, base, experts)
    state = {key: value.clone() for key, value in experts[0].state_dict().items()}
    save_file(state, tmp_path / "expert0" / "model.safetensors", metadata={"format": "pt"})
    model_class = getattr(transformers, family.class_name)
    classes = (model_class, model_class)
    check_exports(tmp_path, base, experts, all_parameters, classes=classes)


def test_an_expert_that_lacks_a_matrix_of_a_mixture_is_refused(tmp_path: Path) -> None:
    base = make_language_model("qwen3_moe")
    write_all(tmp_path, base, [tune(base, seed=21), tune(base, seed=22)])
    save_in_memory_form(base, tmp_path / "base")
    file = tmp_path / "expert0" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in different layouts .* unknown or incomplete"):
        make_plan(read_recipe(write_recipe(tmp_path, "ties")))


def test_matrices_of_a_mixture_in_several_dtypes_are_refused(tmp_path: Path) -> None:
    base = make_language_model("qwen3_moe")
    write_all(tmp_path, base, [tune(base, seed=21), tune(base, seed=22)])
    save_in_memory_form(base, tmp_path / "base")
    file = tmp_path / "expert0" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="are of BF16 and F32"):
        make_plan(read_recipe(write_recipe(tmp_path, "ties")))
