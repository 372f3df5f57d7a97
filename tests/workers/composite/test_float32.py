"""Composites of bfloat16 builds that are loaded in float32: no weight is rounded on its way.

The reference is a LLaMA in plain torch that multiplies token by token by weights formed in float32
from the stored bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import EXPERTS, build, write_adapters, write_family
from torch import nn

from mmerge.pipeline import Part, load_composite, make_plan, parse_recipe, run
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.routing import TEXT
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

REPOSITORY = Path(__file__).resolve().parent.parent.parent.parent
RECIPES = REPOSITORY / "examples" / "lab" / "recipes"


class NaiveLlama:
    """Logits of a LLaMA whose every projection is made per token, by that token's own weights."""

    def __init__(self, uri: str, config: Any) -> None:
        self.reader, self.config = BuildReader(uri), config
        self.formed: dict[tuple[str, int], torch.Tensor] = {}

    def weight(self, name: str, modality: int = TEXT) -> torch.Tensor:
        key = name, modality
        if key not in self.formed:
            self.formed[key] = self._form(name, modality)
        return self.formed[key]

    def _form(self, name: str, modality: int) -> torch.Tensor:
        reader = self.reader
        base = reader.read(name, "base").float()
        experts = reader.expert_names
        if reader.manifest.kind == "adapters":
            return self._add_products(base, name, modality)
        masks = [
            unpack_mask(reader.read_packed_mask(name, expert), base.shape).float()
            for expert in experts
        ]
        mask = torch.stack(masks).mean(dim=0) if modality == TEXT else masks[modality]
        return base + mask * reader.read(name, "delta").float()

    def _add_products(self, base: torch.Tensor, name: str, modality: int) -> torch.Tensor:
        reader = self.reader
        path = name.removesuffix(".weight")
        experts = reader.expert_names if modality == TEXT else [reader.expert_names[modality]]
        for expert in experts:
            record = reader.manifest.to_expert(expert).adapters
            assert record is not None
            adapter = record.default_adapter if modality == TEXT else record.modality_adapter
            key = f"{path}.lora_%s.{adapter}.weight"
            if not reader.has(key % "A", "adapter", expert):
                continue
            a, b = (reader.read(key % factor, "adapter", expert).float() for factor in "AB")
            coefficient = record.coefficient if modality == TEXT else 1.0
            base = base + coefficient * record.scale_of(name, adapter) * (b @ a)
        return base

    def project(self, path: str, inputs: torch.Tensor, ids: list[int]) -> torch.Tensor:
        rows = []
        for token, modality in zip(inputs, ids, strict=True):
            row = self.weight(f"{path}.weight", modality) @ token
            if self.reader.has(f"{path}.bias", "base"):
                row = row + self.weight(f"{path}.bias", modality)
            rows.append(row)
        return torch.stack(rows)

    def norm(self, path: str, inputs: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return inputs * scale * self.weight(f"{path}.weight")

    def attend(self, path: str, inputs: torch.Tensor, ids: list[int]) -> torch.Tensor:
        config, length = self.config, len(ids)
        query, key, value = (
            self.project(f"{path}.{kind}_proj", inputs, ids)
            .view(length, -1, config.head_dim)
            .transpose(0, 1)
            for kind in "qkv"
        )
        query, key = self.rotate(query), self.rotate(key)
        groups = query.shape[0] // key.shape[0]
        key, value = (part.repeat_interleave(groups, dim=0) for part in (key, value))
        scores = query @ key.transpose(1, 2) / math.sqrt(config.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = (shares @ value).transpose(0, 1).reshape(length, -1)
        return self.project(f"{path}.o_proj", mixed, ids)

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(heads.shape[1])[:, None] / theta ** (torch.arange(half) / half)
        cos, sin = angles.cos(), angles.sin()
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def logits(self, embeds: torch.Tensor, ids: list[int]) -> torch.Tensor:
        hidden = embeds
        for layer in range(self.config.num_hidden_layers):
            path = f"model.layers.{layer}"
            normed = self.norm(f"{path}.input_layernorm", hidden)
            hidden = hidden + self.attend(f"{path}.self_attn", normed, ids)
            normed = self.norm(f"{path}.post_attention_layernorm", hidden)
            gate = nn.functional.silu(self.project(f"{path}.mlp.gate_proj", normed, ids))
            up = self.project(f"{path}.mlp.up_proj", normed, ids)
            hidden = hidden + self.project(f"{path}.mlp.down_proj", gate * up, ids)
        return self.norm("model.norm", hidden) @ self.weight("lm_head.weight").T


def make_prompt(composite: Composite) -> list[Part]:
    generator = torch.Generator().manual_seed(7)
    hidden = composite.language_model.config.hidden_size
    parts = [Part("ids", [5, 6])]
    for number, name in enumerate(composite.encoders):
        features = 0.5 * torch.randn(2 + number, hidden, generator=generator)
        parts += [Part(name, features), Part("ids", [7 + number, 20])]
    return parts


def embed(composite: Composite, parts: list[Part], naive: NaiveLlama) -> tuple[Any, list[int]]:
    """Features enter as they are; the embeddings of text come from the reference's own table."""
    table = naive.weight("model.embed_tokens.weight")
    embeds, ids = [], []
    bos = composite.tokenizer.bos_token_id
    leads = composite.tokenizer("")["input_ids"][:1] == [bos]
    for part in [Part("ids", [bos]), *parts] if leads else parts:
        embeds.append(table[part.value] if part.kind == "ids" else part.value)
        modality = TEXT if part.kind == "ids" else naive.reader.expert_names.index(part.kind)
        ids += [modality] * len(part.value)
    return torch.cat(embeds), ids


class AsItIs:
    """An encoder whose inputs are embeddings already."""

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def encode(self, part: Part) -> torch.Tensor:
        embeds: torch.Tensor = part.value
        return embeds


def check_expansion(uri: str, policy: Any = "packed") -> None:
    composite = load_composite(uri, dtype=torch.float32, policy=policy)
    for name, encoder in composite.encoders.items():
        composite.encoders[name] = AsItIs(encoder.modality)
    naive = NaiveLlama(uri, composite.language_model.config)
    parts = make_prompt(composite)
    embeds, ids = embed(composite, parts, naive)
    torch.testing.assert_close(
        composite.logits(parts), naive.logits(embeds, ids), rtol=1e-5, atol=1e-5
    )


@pytest.fixture(scope="module")
def damc_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("damc")
    raw = yaml.safe_load((RECIPES / "damc.yaml").read_text()) | {"output": str(folder)}
    run(make_plan(parse_recipe(raw, folder=RECIPES)))
    return f"{folder}#damc"


@pytest.mark.parametrize("policy", ["packed", "resident"])
def test_expansion_of_the_labs_masks_equals_the_naive_loop(lab_store: str, policy: Any) -> None:
    assert BuildReader(f"{lab_store}#mmer").dtype == torch.bfloat16
    check_expansion(f"{lab_store}#mmer", policy)


def test_expansion_of_the_labs_adapters_equals_the_naive_loop(damc_uri: str) -> None:
    assert BuildReader(damc_uri).dtype == torch.bfloat16
    check_expansion(damc_uri)


def make_random(folder: Path, kind: str) -> str:
    """A bfloat16 build over random tensors that bfloat16 cannot hold exactly."""
    experts = {name: {"path": name, "modality": name} for name in EXPERTS}
    raw: dict[str, Any] = {"dtype": "bfloat16", "experts": experts}
    if kind == "masks":
        write_family(folder, "llama")
        return build(folder, raw | {"method": "mmer", "density": 0.7})
    write_adapters(folder, write_family(folder, "llama", experts=()))
    return build(folder, raw | {"method": "damc"})


@pytest.fixture(scope="module", params=["masks", "adapters"])
def random_uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_random(tmp_path_factory.mktemp(request.param), request.param)


def test_expansion_of_a_random_model_equals_the_naive_loop(random_uri: str) -> None:
    assert BuildReader(random_uri).dtype == torch.bfloat16
    check_expansion(random_uri)


def test_every_kind_of_tensor_is_formed_in_float32_for_text_and_for_an_expert(
    lab_store: str, damc_uri: str
) -> None:
    for uri in (f"{lab_store}#mmer", damc_uri):
        text = load_composite(uri, dtype=torch.float32)
        naive = NaiveLlama(uri, text.language_model.config)
        state = text.language_model.state_dict()
        inexact = 0
        for name in naive.reader.llm_names():
            torch.testing.assert_close(state[name], naive.weight(name), rtol=1e-6, atol=1e-7)
            inexact += not state[name].equal(state[name].bfloat16().float())
        assert inexact > 10, "the comparison could not see a rounding"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_weights_are_those_in_float32_rounded_once(
    lab_store: str, dtype: torch.dtype
) -> None:
    reader = BuildReader(f"{lab_store}#mmer")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        whole = text_weight(reader, name, dtype=torch.float32)
        assert text_weight(reader, name, dtype=dtype).equal(whole.to(dtype))
        whole = rebuild_weight(reader, name, expert="image", dtype=torch.float32)
        assert rebuild_weight(reader, name, expert="image", dtype=dtype).equal(whole.to(dtype))


def test_the_vocabulary_rows_of_an_expert_are_read_in_the_dtype_that_is_asked_for(
    lab_store: str,
) -> None:
    reader = BuildReader(f"{lab_store}#mmer")
    name = "model.embed_tokens.weight"
    rows = reader.read(name, "extra_rows", "audio")
    whole = rebuild_weight(reader, name, expert="audio", dtype=torch.float32)
    assert whole.dtype == torch.float32
    assert whole[-len(rows) :].equal(rows.float())
