"""Composites of decoupled LoRA adapters: each token through its own, as the official code and a
naive sum have it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN, cases, expected
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from mmerge.manifests.errors import (
    CheckpointError,
    ManifestError,
    MmergeError,
    PromptError,
    RecipeError,
    ShapeMismatch,
)
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
from mmerge.workers.composite.model import Composite

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
RANKS = {"image": 4, "audio": 3}


def write_tokenizer(folder: Path) -> None:
    """Forty words, w0 to w39; w1 begins, w2 ends."""
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0"
    ).save_pretrained(folder)


def make_factors(
    lab: Any, modality: str, adapters: tuple[str, ...], *, rank: int, prefix: str = ""
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, modality)))
    factors = {}
    for layer in range(2):
        for linear in LINEARS:
            out, width = lab.base[f"model.layers.{layer}.{linear}.weight"].shape
            for adapter in adapters:
                name = f"{prefix}model.layers.{layer}.{linear}.lora_%s.{adapter}.weight"
                factors[name % "A"] = torch.randn((rank, width), generator=generator)
                factors[name % "B"] = 0.3 * torch.randn((out, rank), generator=generator)
    return factors


def write_official(lab: Any, modality: str) -> None:
    """An expert in the official layout: adapter_model.bin, config.json and mm_projector.bin,
    pickled.
    """
    folder = lab.folder / modality
    folder.mkdir()
    factors = make_factors(lab, modality, ("default", modality), rank=RANKS[modality])
    tokens = {
        f"{place}_tokens.{modality}": torch.full((1, 5, 16), value)
        for place, value in (("prefix", 0.5), ("suffix", -0.5))
    }
    torch.save(factors | tokens, folder / "adapter_model.bin")
    torch.save(
        {f"model.modal_projectors.{modality}.weight": torch.randn(16, 12)},
        folder / "mm_projector.bin",
    )
    config = {
        "model_type": "multimodal",
        "use_cache": True,
        "lora_r": RANKS[modality],
        "lora_alpha": 8,
        "local_prefix_tokens": 5,
        "local_suffix_tokens": 5,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_peft(lab: Any, modality: str) -> None:
    """An expert as PEFT saves two adapters: the default one in the folder, the other in a subfolder
    by its name.
    """
    factors = make_factors(
        lab, modality, ("default", modality), rank=RANKS[modality], prefix="base_model.model."
    )
    for adapter, folder in (
        ("default", lab.folder / modality),
        (modality, lab.folder / modality / modality),
    ):
        folder.mkdir()
        own = {
            name.replace(f".{adapter}.weight", ".weight"): value
            for name, value in factors.items()
            if f".{adapter}." in name
        }
        save_file(own, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": RANKS[modality], "lora_alpha": 8})
        )


@pytest.fixture
def recipe(lab: Any) -> dict[str, Any]:
    lab.dtype = torch.float32
    lab.config["dtype"] = "float32"
    write_tokenizer(lab.make_base())
    write_official(lab, "image")
    write_peft(lab, "audio")
    return {
        "name": "duo",
        "base": "base",
        "method": "damc",
        "output": "store",
        "experts": {
            "image": {"path": "image", "modality": "image", "coefficient": 0.7},
            "audio": {"path": "audio", "modality": "audio"},
        },
    }


def build(lab: Any, raw: dict[str, Any]) -> str:
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    return str(lab.folder / "store")


def naive(
    lab: Any, linear: str, token: torch.Tensor, modality: str | None, coefficients: dict[str, float]
) -> torch.Tensor:
    """W x and the adapters' own products, one after the other."""
    output = lab.base[f"model.{linear}.weight"] @ token
    for expert in ("image", "audio"):
        if modality not in (None, expert):
            continue
        adapter, coefficient = (modality, 1.0) if modality else ("default", coefficients[expert])
        factors = make_factors(lab, expert, ("default", expert), rank=RANKS[expert])
        a, b = (factors[f"model.{linear}.lora_{factor}.{adapter}.weight"] for factor in "AB")
        output = output + coefficient * 8 / RANKS[expert] * (b @ (a @ token))
    return output


def test_every_token_runs_through_the_adapters_of_its_modality_alone(
    lab: Any, recipe: dict[str, Any]
) -> None:
    composite = load_composite(build(lab, recipe))
    ids = torch.tensor([[-1, 0, 0, 1, -1, 1]])
    inputs = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    module = composite.language_model.get_submodule("model.layers.1.self_attn.v_proj")
    with composite._routing.prefill(ids):
        outputs = module(inputs)
    kinds = {-1: None, 0: "image", 1: "audio"}
    expected = [
        naive(
            lab,
            "layers.1.self_attn.v_proj",
            inputs[0, index],
            kinds[int(ids[0, index])],
            {"image": 0.7, "audio": 0.5},
        )
        for index in range(6)
    ]
    torch.testing.assert_close(outputs[0], torch.stack(expected), rtol=1e-4, atol=1e-4)
    decoded = module(inputs[:, :1])
    torch.testing.assert_close(
        decoded[0, 0],
        naive(lab, "layers.1.self_attn.v_proj", inputs[0, 0], None, {"image": 0.7, "audio": 0.5}),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_token_is_multiplied_with_the_weight_once(
    lab: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    composite = load_composite(build(lab, recipe))
    module = composite.language_model.get_submodule("model.layers.0.mlp.up_proj")
    rows = []
    linear = nn.functional.linear

    def count(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.shape == module.weight.shape:
            rows.append(inputs.shape[:-1].numel())
        return linear(inputs, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", count)
    with composite._routing.prefill(torch.tensor([[-1, 0, 1, 1]])):
        module(torch.randn(1, 4, 16))
    assert rows == [4]


def test_a_composite_of_two_adapters_generates_and_its_answers_follow_its_adapters(
    lab: Any, recipe: dict[str, Any]
) -> None:
    uri = build(lab, recipe)
    verify(uri).check()
    composite = load_composite(uri)
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    embeddings = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    parts = [
        Part.text("w5 w6"),
        Part("image", features),
        Part("audio", embeddings.numpy()),
        Part.text("w7"),
    ]
    embeds, ids = composite.embed(parts)
    assert ids.tolist() == [-1] * 2 + [0] * 13 + [1] * 4 + [-1], (
        "learned prefix and suffix tokens count as tokens of their modality"
    )
    assert torch.equal(embeds[2:7], torch.full((5, 16), 0.5))
    assert torch.equal(embeds[10:15], torch.full((5, 16), -0.5))
    answer = composite.generate(parts, max_new_tokens=6)
    assert answer
    assert answer == load_composite(uri).generate(parts, max_new_tokens=6)
    plain = _logits_without_adapters(lab, embeds)
    assert not torch.allclose(composite.logits(parts), plain, atol=1e-2), (
        "the adapters change nothing"
    )


def _logits_without_adapters(lab: Any, embeds: torch.Tensor) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        lab.folder / "base", dtype=torch.float32, trust_remote_code=False
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(inputs_embeds=embeds[None].clone()).logits[0]
    return logits


def test_adapters_can_be_experts_of_a_merge_with_masks_and_generate(
    lab: Any, recipe: dict[str, Any]
) -> None:
    experts = {name: {"path": name, "modality": name} for name in ("image", "audio")}
    uri = build(lab, recipe | {"method": "mmer", "experts": experts})
    parts = [Part("image", torch.randn(2, 12)), Part("audio", torch.randn(2, 16)), Part.text("w5")]
    assert load_composite(uri).generate(parts, max_new_tokens=3)
    assert load_composite(uri, mode="retention", expert="image").generate(
        parts[:1], max_new_tokens=3
    )


def test_each_adapter_has_the_scale_of_its_own_configuration_and_states_of_training_are_none(
    lab: Any, recipe: dict[str, Any]
) -> None:
    own = lab.folder / "audio" / "audio" / "adapter_config.json"
    own.write_text(json.dumps({"peft_type": "LORA", "r": RANKS["audio"], "lora_alpha": 80}))
    state = lab.folder / "audio" / "checkpoint-100"
    state.mkdir()
    save_file(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(1, 16)},
        state / "adapter_model.safetensors",
    )
    plan = make_plan(read_recipe(lab.write_recipe(recipe)))
    record = plan.adapters[1]
    assert (record.default_adapter, record.modality_adapter) == ("default", "audio")
    name = "model.layers.0.mlp.up_proj.weight"
    assert record.scale_of(name, "default") == pytest.approx(8 / 3)
    assert record.scale_of(name, "audio") == pytest.approx(80 / 3)


def test_retention_runs_one_expert_as_it_was_tuned(lab: Any, recipe: dict[str, Any]) -> None:
    composite = load_composite(build(lab, recipe), mode="retention", expert="image")
    module = composite.language_model.get_submodule("model.layers.0.mlp.down_proj")
    inputs = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(4))
    with composite._routing.prefill(torch.tensor([[-1, 0]])):
        outputs = module(inputs)
    text = naive(lab, "layers.0.mlp.down_proj", inputs[0, 0], None, {"image": 1.0, "audio": 0.0})
    image = naive(lab, "layers.0.mlp.down_proj", inputs[0, 1], "image", {})
    torch.testing.assert_close(outputs[0], torch.stack([text, image]), rtol=1e-4, atol=1e-4)


def test_the_export_of_text_weights_has_the_default_adapters_in_it(
    lab: Any, recipe: dict[str, Any]
) -> None:
    uri = build(lab, recipe)
    export(uri, lab.folder / "exported")
    exported = load_file(lab.folder / "exported" / "model.safetensors")
    unit = torch.zeros(16)
    unit[3] = 1
    expected = naive(lab, "layers.0.self_attn.q_proj", unit, None, {"image": 0.7, "audio": 0.5})
    torch.testing.assert_close(
        exported["model.layers.0.self_attn.q_proj.weight"][:, 3], expected, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ManifestError, match="without --expert"):
        export(uri, lab.folder / "other", expert="image")


def test_two_builds_of_the_same_adapters_have_the_same_bytes(
    lab: Any, recipe: dict[str, Any]
) -> None:
    first = run(make_plan(read_recipe(lab.write_recipe(recipe))))
    second = run(
        make_plan(
            read_recipe(lab.write_recipe(recipe | {"output": "again"})), block_entries=1 << 16
        )
    )
    assert first.build == second.build
    third = run(
        make_plan(
            read_recipe(
                lab.write_recipe(
                    recipe
                    | {
                        "experts": (
                            recipe["experts"]
                            | {"audio": {"path": "audio", "modality": "audio", "coefficient": 0.1}}
                        )
                    }
                )
            )
        )
    )
    assert third.build != first.build
    assert third.num_computed["copy"] == 0, "a coefficient is no reason to copy adapters again"


def _change_config(lab: Any, **keys: Any) -> None:
    path = lab.folder / "audio" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _drop_factor(lab: Any) -> None:
    path = lab.folder / "audio" / "adapter_model.safetensors"
    save_file(
        {
            name: value
            for name, value in load_file(path).items()
            if "layers.0.mlp.up_proj.lora_B" not in name
        },
        path,
    )


def _narrow(lab: Any) -> None:
    path = lab.folder / "audio" / "adapter_model.safetensors"
    save_file(
        {
            name: value[:, :7].contiguous() if "lora_A" in name else value
            for name, value in load_file(path).items()
        },
        path,
    )


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda lab: _change_config(lab, use_dora=True), CheckpointError, "lora_magnitude_vector"),
        (lambda lab: _change_config(lab, r=9), CheckpointError, "says rank 9, the factors have 3"),
        (lambda lab: _change_config(lab, lora_alpha=None), CheckpointError, "lora_alpha"),
        (_drop_factor, CheckpointError, "has only lora_A"),
        (_narrow, ShapeMismatch, "the base has"),
    ],
)
def test_a_damaged_adapter_is_refused_with_its_reason(
    lab: Any, recipe: dict[str, Any], spoil: Any, error: type[MmergeError], message: str
) -> None:
    spoil(lab)
    with pytest.raises(error, match=message):
        make_plan(read_recipe(lab.write_recipe(recipe)))


def test_a_pickled_adapter_that_would_run_code_is_refused(lab: Any, recipe: dict[str, Any]) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (Path(lab.folder / "harmed"),))  # type: ignore[return-value]

    torch.save({"w": Harmful()}, lab.folder / "image" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        make_plan(read_recipe(lab.write_recipe(recipe)))
    assert not (lab.folder / "harmed").exists()


def test_what_damc_cannot_use_is_refused(lab: Any, recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="merge: has no effect"):
        make_plan(read_recipe(lab.write_recipe(recipe | {"merge": "linear"})))
    lab.make_expert("whole", 0)
    experts = recipe["experts"] | {"whole": {"path": "whole", "modality": "video"}}
    with pytest.raises(RecipeError, match="holds no LoRA adapter"):
        make_plan(read_recipe(lab.write_recipe(recipe | {"experts": experts})))
    experts = {"audio": {"path": "audio", "modality": "audio", "adapter": "sound"}}
    with pytest.raises(CheckpointError, match="no adapter 'sound'; it has audio, default"):
        make_plan(read_recipe(lab.write_recipe(recipe | {"experts": experts})))


def test_features_of_a_wrong_width_are_refused(lab: Any, recipe: dict[str, Any]) -> None:
    composite = load_composite(build(lab, recipe))
    with pytest.raises(PromptError, match="width 11, the connector of expert 'image' takes 12"):
        composite.generate([Part("image", torch.randn(2, 11))], max_new_tokens=1)
    with pytest.raises(
        PromptError,
        match=(
            r"missing.wav: no such file\. Expert 'audio' has no encoder in its files: .*numpy\.save"
        ),
    ):
        composite.generate([Part("audio", "missing.wav")], max_new_tokens=1)


def compose_golden(case: dict[str, Any], folder: Path) -> Composite:
    """Build and load the composite of a golden case through the pipeline."""
    base, *adapters = [GOLDEN / Path(name).parent for name in case["inputs"]]
    local = folder / "base"
    local.mkdir()
    for name in ("config.json", "model.safetensors"):
        (local / name).write_bytes((base / name).read_bytes())
    write_tokenizer(local)
    modalities = [path.name.removeprefix("lora_") for path in adapters]
    experts = {
        modality: {
            "path": str(path),
            "modality": modality,
            "coefficient": case["params"]["coefficients"][f"default-{modality}"],
        }
        for modality, path in zip(modalities, adapters, strict=True)
    }
    raw = {
        "method": "damc",
        "base": str(local),
        "experts": experts,
        "output": str(folder / "store"),
        "dtype": "float32",
    }
    run(make_plan(parse_recipe(raw, folder=folder)))
    return load_composite(str(folder / "store"))


def needed(case: dict[str, Any], name: str) -> torch.Tensor:
    found = expected(case, name)
    assert found is not None
    return found


@cases("damc")
def test_the_forward_pass_is_that_of_the_golden_case(case: dict[str, Any], tmp_path: Path) -> None:
    composite = compose_golden(case, tmp_path)
    tolerance = {"rtol": case["tolerance"]["rtol"], "atol": case["tolerance"]["atol"]}
    # Token kinds of the golden data: 0 text, 1 and 2 the experts in the order of the inputs.
    ids = needed(case, "token_kind").long() - 1
    model, routing = composite.language_model, composite._routing
    with torch.inference_mode():
        if "x" in case["tensors"]:
            for name in [
                key.removeprefix("y.layers.")
                for key in case["tensors"]
                if key.startswith("y.layers.")
            ]:
                module = model.get_submodule(f"model.layers.{name}")
                inputs = needed(case, "x_ffn" if name.endswith("down_proj") else "x")
                with routing.prefill(ids):
                    torch.testing.assert_close(
                        module(inputs), needed(case, f"y.layers.{name}"), **tolerance
                    )
                torch.testing.assert_close(
                    module(inputs), needed(case, f"y_default.layers.{name}"), **tolerance
                )
            return
        embeds = needed(case, "inputs_embeds")
        with composite._routing.prefill(ids):
            output = model(inputs_embeds=embeds, use_cache=True, output_hidden_states=True)
            torch.testing.assert_close(output.logits, needed(case, "logits"), **tolerance)
            torch.testing.assert_close(
                output.hidden_states[-1], needed(case, "last_hidden_state"), **tolerance
            )
            torch.testing.assert_close(
                output.hidden_states[1], needed(case, "hidden_after_layer0"), **tolerance
            )
            decoded = model(
                input_ids=needed(case, "next_input_ids"),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            torch.testing.assert_close(decoded.logits, needed(case, "next_logits"), **tolerance)
        text = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        torch.testing.assert_close(
            text.hidden_states[-1], needed(case, "last_hidden_state_all_default"), **tolerance
        )
        with routing.prefill(ids):
            places = model.model.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
            attended = model.model.layers[0].self_attn(
                hidden_states=embeds, position_embeddings=places, attention_mask=None
            )[0]
            torch.testing.assert_close(attended, needed(case, "attention_layer0"), **tolerance)
            torch.testing.assert_close(
                model.model.layers[0].mlp(embeds), needed(case, "mlp_layer0"), **tolerance
            )
