"""mergekit YAMLs as their authors published them, and tiny models that they merge.

Names of models are replaced, layer counts scaled to four. `Yaml.refusal` is what is said of a file
that is not merged; mergekit 0.1.5 itself refuses those with `mergekit_refuses`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, NUM_LAYERS = 8, 12, 4
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "a", "b", "c", "d"]
TOKENS: Mapping[str, Sequence[str]] = {
    "base": WORDS,
    "m1": WORDS,
    "m2": WORDS,
    "m3": WORDS,
    # A longer vocabulary, and a permuted one whose embedding has more rows than tokens.
    "t1": [*WORDS, "x"],
    "t2": [*SPECIAL, "d", "c", "b", "a", "y", "x"],
    "deep": WORDS,
}
"""The tokens of every model, by id."""
PADDED_ROWS = {"t2": 12}
TEMPLATES = {
    "base": "BASE {{ messages }}",
    "t1": "TUNED {{ messages }}",
    "t2": "TUNED {{ messages }}",
}
LAYERS = {"deep": 6}


@dataclass(frozen=True)
class Yaml:
    """One published YAML."""

    config: Mapping[str, Any]
    refusal: str = ""
    mergekit_refuses: bool = False
    compared: Mapping[str, Any] | None = None
    """What is compared in its place: the same file without random numbers."""

    @property
    def is_merged(self) -> bool:
        """Whether both programs merge it."""
        return not self.refusal


def make_models(folder: Path) -> None:
    """Write the models: random LLaMA-shaped ones in float32, and an adapter of the base."""
    for seed, name in enumerate(TOKENS):
        make_model(folder / name, TOKENS[name], seed=seed, num_layers=LAYERS.get(name, NUM_LAYERS))
    for name, rows in PADDED_ROWS.items():
        _write_weights(folder / name, rows=rows, seed=99, num_layers=NUM_LAYERS)
    for name, template in TEMPLATES.items():
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    adapter = folder / "lora"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(50)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, HIDDEN, generator=generator),
        f"{module}.lora_B.weight": torch.randn(HIDDEN, 2, generator=generator),
    }
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def make_model(folder: Path, tokens: Sequence[str], *, seed: int, num_layers: int) -> None:
    """Write one model with its tokenizer."""
    folder.mkdir(parents=True)
    _write_weights(folder, rows=len(tokens), seed=seed, num_layers=num_layers)
    write_tokenizer(folder, tokens)


def _write_weights(folder: Path, *, rows: int, seed: int, num_layers: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": draw(rows, HIDDEN),
        "model.norm.weight": draw(HIDDEN),
        "lm_head.weight": draw(rows, HIDDEN),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (4, HIDDEN),
        "self_attn.v_proj": (4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    for layer in range(num_layers):
        for path, shape in shapes.items():
            tensors[f"model.layers.{layer}.{path}.weight"] = draw(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": rows,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    """Write a tokenizer of whole words."""
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(tokens)
        if token in SPECIAL
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def model(name: str, **parameters: Any) -> dict[str, Any]:
    """Return an entry of `models`."""
    return {"model": name} | ({"parameters": parameters} if parameters else {})


def layers(name: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    """Return an entry of `sources`."""
    entry = {"model": name, "layer_range": [first, stop]}
    return entry | ({"parameters": parameters} if parameters else {})


def all_layers(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    """Return slices of one slice."""
    return [{"sources": list(entries)}]


def dare(density: float, **changes: Any) -> dict[str, Any]:
    """Return a DARE-TIES file with one density."""
    models = [
        model("base"),
        model("m1", density=density, weight=0.4),
        model("m2", density=density, weight=0.3),
    ]
    config = {"models": models, "merge_method": "dare_ties", "base_model": "base"}
    return config | {"parameters": {"int8_mask": True}, "dtype": "bfloat16"} | changes


def linear(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a linear merge."""
    return {"models": list(entries), "merge_method": "linear", "dtype": "float16"} | changes


def arithmetic(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a task-arithmetic merge over the base."""
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": list(entries)}
    return config | {"dtype": "float32"} | changes


HALF = {"density": 0.5, "weight": 0.5}
SLERP_T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
SLERP = {
    "merge_method": "slerp",
    "base_model": "m1",
    "parameters": {"t": SLERP_T},
    "dtype": "float16",
}
TWO = [model("m1", weight=1), model("m2", weight=1)]
TUNED = [model("t1", weight=1), model("t2", weight=0.5)]

PUBLISHED: dict[str, Yaml] = {
    "dare_ties, int8_mask, base listed": Yaml(dare(0.53), compared=dare(1.0)),
    "slerp over gradients": Yaml(
        SLERP | {"slices": all_layers(layers("m1", 0, 4), layers("m2", 0, 4))}
    ),
    "ties, gradients and filters": Yaml(
        {
            "models": [
                model("m1", density=[1, 0.7, 0.2], weight=1.0),
                model("m2", density=0.5, weight=[0, 0.3, 0.7, 1]),
                model("m3", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
            ],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"normalize": True, "int8_mask": True},
            "dtype": "float16",
        }
    ),
    "ties, normalize false": Yaml(
        {
            "models": [model("m1", **HALF), model("m2", **HALF)],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"normalize": False, "int8_mask": True},
            "dtype": "float16",
        }
    ),
    "linear": Yaml(
        linear(model("m1", weight=1.0), model("m2", weight=0.3), model("m3", weight=0.5))
    ),
    "tokenizer_source by the base's path, chat_template auto": Yaml(
        dare(0.5, tokenizer_source="./base", chat_template="auto"),
        compared=dare(1.0, tokenizer_source="base", chat_template="auto"),
    ),
    "dare_ties, union, base with a weight": Yaml(
        {
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": [model(name, weight=0.2) for name in ("base", "m1", "m2")],
            "parameters": {"density": 0.3},
            "tokenizer": {"source": "union"},
            "chat_template": "auto",
        },
        compared={
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": [model(name, weight=0.2) for name in ("base", "m1", "m2")],
            "parameters": {"density": 1.0},
            "tokenizer": {"source": "union"},
            "chat_template": "auto",
        },
    ),
    "task_arithmetic as slices with the base first": Yaml(
        {
            "base_model": "base",
            "dtype": "bfloat16",
            "merge_method": "task_arithmetic",
            "parameters": {"normalize": False},
            "slices": all_layers(
                layers("base", 0, 4), layers("m1", 0, 4, weight=0.5), layers("m2", 0, 4, weight=0.5)
            ),
        }
    ),
    "passthrough with overlaps": Yaml(
        {
            "dtype": "bfloat16",
            "merge_method": "passthrough",
            "slices": [
                {"sources": [layers("m1", 0, 2)]},
                {"sources": [layers("m1", 1, 3)]},
                {"sources": [layers("m2", 2, 4)]},
            ],
        }
    ),
    "linear of four ranges of one model": Yaml(
        {
            "dtype": "float16",
            "merge_method": "linear",
            "slices": all_layers(*(layers("m1", i, i + 1, weight=0.25) for i in range(4))),
        },
        refusal="'m1' is given twice among the models of one merge, which mergekit refuses too",
        mergekit_refuses=True,
    ),
    "model_stock, weights without effect, out_dtype": Yaml(
        {
            "dtype": "float32",
            "out_dtype": "bfloat16",
            "merge_method": "model_stock",
            "base_model": "base",
            "models": [
                model("m1", weight=[{"filter": "mlp", "value": [2, 1]}, {"value": 1}]),
                model("m2", weight=[{"filter": "mlp", "value": [1, 2]}, {"value": 1}]),
            ],
        }
    ),
    "model_stock, name, tokenizer_source by the base's name": Yaml(
        {
            "name": "Athena",
            "base_model": "base",
            "dtype": "bfloat16",
            "merge_method": "model_stock",
            "models": [model("m1"), model("m2"), model("m3")],
            "tokenizer_source": "base",
        }
    ),
    "model_stock, base among the models": Yaml(
        {
            "models": [model("m1"), model("m2"), model("m3"), model("base")],
            "merge_method": "model_stock",
            "base_model": "base",
            "dtype": "bfloat16",
        }
    ),
    "model_stock over model+lora": Yaml(
        {
            "models": [model("m1+lora"), model("m2+lora")],
            "merge_method": "model_stock",
            "base_model": "base+lora",
            "dtype": "bfloat16",
        }
    ),
    "task_arithmetic over base+lora": Yaml(arithmetic(model("base+lora", weight=1.0))),
    "passthrough with a revision beside the model": Yaml(
        {
            "slices": [
                {"sources": [{"model": "m1", "revision": "dpo-v0", "layer_range": [0, 3]}]},
                {"sources": [layers("m2", 1, 4)]},
            ],
            "merge_method": "passthrough",
            "dtype": "bfloat16",
        }
    ),
    "modules: text_decoder and vision_tower": Yaml(
        {
            "modules": {
                "text_decoder": {"slices": all_layers(layers("m1", 0, 4), layers("m2", 0, 4))},
                "vision_tower": {"models": [model("m1")]},
            },
            **SLERP,
        },
        refusal="vision_tower: .* has no tensors beside its language model",
        mergekit_refuses=True,
    ),
    "linear, normalize at the top": Yaml(
        linear(*(model(name, weight=1.0) for name in ("m1", "m2", "m3")), normalize=True)
    ),
    "slerp, base not among the two, union": Yaml(
        {
            **SLERP,
            "slices": all_layers(layers("m1", 0, 4), layers("m2", 0, 4)),
            "base_model": "base",
            "tokenizer_source": "union",
        },
        refusal="slerp takes one model beside base_model, got 2. mergekit refuses others too",
        mergekit_refuses=True,
    ),
    "linear, union": Yaml(
        linear(*(model(name, weight=1.0) for name in ("m1", "m2", "m3")), tokenizer_source="union")
    ),
    "dare_ties, rescale false, lambda": Yaml(
        {
            "models": [
                model("m1", weight=1.0, density=1.0),
                model("m2", weight=0.846, density=1.0),
            ],
            "base_model": "base",
            "merge_method": "dare_ties",
            "dtype": "bfloat16",
            "parameters": {"lambda": 1.0, "rescale": False},
        }
    ),
    "slerp, filters embed_tokens and lm_head": Yaml(
        {
            "merge_method": "slerp",
            "base_model": "m1",
            "models": [model("m1"), model("m2")],
            "parameters": {
                "t": [
                    {"filter": "embed_tokens", "value": 0.7},
                    {"filter": "lm_head", "value": 0.7},
                    {"value": 0.5},
                ]
            },
            "dtype": "bfloat16",
        }
    ),
    "nuslerp, no base": Yaml(
        {
            "name": "knowledge_core",
            "merge_method": "nuslerp",
            "models": [model("m1", weight=0.4), model("m2", weight=0.6)],
            "dtype": "bfloat16",
        }
    ),
    "della, one model, tokenizer_source base": Yaml(
        {
            "models": [model("m1", weight=0.3, density=0.4)],
            "merge_method": "della",
            "base_model": "base",
            "parameters": {"epsilon": 0.05, "lambda": 1},
            "dtype": "bfloat16",
            "tokenizer_source": "base",
        },
        compared={
            "models": [model("m1", weight=0.3, density=1.0)],
            "merge_method": "della",
            "base_model": "base",
            "parameters": {"epsilon": 0.0, "lambda": 1},
            "dtype": "bfloat16",
            "tokenizer_source": "base",
        },
    ),
    "breadcrumbs_ties, base listed": Yaml(
        {
            "models": [model("base"), model("m1", weight=0.5, density=0.9, gamma=0.01)],
            "base_model": "base",
            "merge_method": "breadcrumbs_ties",
            "dtype": "bfloat16",
        }
    ),
    "arcee_fusion": Yaml(
        {
            "models": [model("m1"), model("m2")],
            "merge_method": "arcee_fusion",
            "base_model": "m1",
            "dtype": "bfloat16",
        }
    ),
    "ties, keys without parameters": Yaml(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "m1", "density": 1.0, "weight": 0.6}],
        },
        refusal=r"models\.0\.density: mergekit does not read it here. Write it under 'parameters'",
        mergekit_refuses=True,
    ),
    "dare_ties, dtype under parameters": Yaml(
        dare(0.6, parameters={"int8_mask": True, "dtype": "bfloat16"}, dtype=None),
        compared=dare(1.0, parameters={"int8_mask": True, "dtype": "bfloat16"}, dtype=None),
    ),
    "slerp on q_proj only": Yaml(
        {
            "models": [model("m1"), model("m2")],
            "merge_method": "slerp",
            "base_model": "m1",
            "parameters": {"t": [{"filter": "q_proj", "value": 0.5}, {"value": 0}]},
            "dtype": "bfloat16",
        }
    ),
    "tokenizer with a tokens map": Yaml(
        arithmetic(*TUNED, tokenizer={"source": "union", "tokens": {"x": {"source": "t2"}}})
    ),
    "moe": Yaml(
        {
            "base_model": "base",
            "gate_mode": "random",
            "dtype": "bfloat16",
            "experts": [
                {"source_model": "m1", "positive_prompts": ["a"]},
                {"source_model": "m2", "positive_prompts": ["b"]},
            ],
        },
        refusal="gate_mode: this is a file of mergekit-moe.* its output is a checkpoint",
        mergekit_refuses=True,
    ),
    "dtype: bfloat": Yaml(
        linear(*TWO, dtype="bfloat"),
        refusal="dtype: should be 'bfloat16', 'float16' or 'float32', got 'bfloat'",
        mergekit_refuses=True,
    ),
    "dtype: auto": Yaml(
        linear(*TWO, dtype="auto"),
        refusal="dtype: should be 'bfloat16', 'float16' or 'float32', got 'auto'",
        mergekit_refuses=True,
    ),
}
"""The published files, by what is special in them; several documents in one file are the 34th."""

TOKEN_ROWS = {
    "source": "union",
    "pad_to_multiple_of": 4,
    "tokens": {
        "x": {"source": "t2"},
        "a": {"source": "t2", "force": True},
        "y": {"source": {"kind": "zero"}},
        "b": {"source": {"kind": "model_token", "model": "t2", "token": "c"}, "force": True},
        "new": {"source": {"kind": "model_token", "model": "t2", "token_id": 3}},
    },
}
FEATURES: dict[str, Yaml] = {
    "tokens: union": Yaml(arithmetic(*TUNED, tokenizer={"source": "union"})),
    "tokens: base": Yaml(arithmetic(*TUNED, tokenizer_source="base")),
    "tokens: another model's": Yaml(arithmetic(*TUNED, tokenizer={"source": "t2"})),
    "tokens: without base": Yaml(linear(*TUNED, dtype="float32", tokenizer={"source": "t2"})),
    "tokens: linear with base_model": Yaml(
        linear(
            model("t1", weight=1),
            model("base", weight=2),
            model("t2", weight=0.5),
            base_model="base",
            tokenizer={"source": "union"},
        )
    ),
    "tokens: linear with base_model, its tokenizer": Yaml(
        linear(
            model("t1", weight=1),
            model("t2", weight=0.5),
            base_model="t2",
            tokenizer_source="base",
            chat_template="auto",
        )
    ),
    "tokens: rows of single tokens": Yaml(
        arithmetic(*TUNED, tokenizer=TOKEN_ROWS | {"pad_to_multiple_of": None})
    ),
    "tokens: the default source": Yaml(
        arithmetic(*TUNED, tokenizer={"tokens": {"y": {"source": "t2"}}})
    ),
    "tokens: passthrough of two models": Yaml(
        {
            "dtype": "float32",
            "merge_method": "passthrough",
            "tokenizer_source": "t1",
            "slices": [{"sources": [layers("t1", 0, 2)]}, {"sources": [layers("t2", 1, 4)]}],
        }
    ),
    "chat_template of most models": Yaml(
        arithmetic(*TUNED, tokenizer_source="base", chat_template="auto")
    ),
    "chat_template chatml": Yaml(arithmetic(model("m1", weight=1), chat_template="chatml")),
    "slices of the base and others": Yaml(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "dtype": "float32",
            "slices": [
                {"sources": [layers("base", 0, 2), layers("m1", 1, 3, weight=0.5)]},
                {"sources": [layers("base", 0, 2), layers("m1", 2, 4, weight=0.25)]},
            ],
        }
    ),
    "slices of a deeper model": Yaml(
        {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "slices": all_layers(layers("m1", 0, 4, weight=1), layers("deep", 2, 6, weight=3)),
        }
    ),
    "slices that leave layers out": Yaml(
        {
            "merge_method": "slerp",
            "base_model": "m1",
            "dtype": "bfloat16",
            "parameters": {"t": [0.2, 0.8]},
            "slices": [
                {"sources": [layers("m1", 0, 1), layers("m2", 3, 4)]},
                {"sources": [layers("m1", 2, 4), layers("m2", 0, 2)]},
            ],
        }
    ),
    "passthrough with a scale": Yaml(
        {
            "dtype": "float32",
            "merge_method": "passthrough",
            "slices": [
                {
                    "sources": [
                        layers(
                            "m1", 0, 3, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]
                        )
                    ]
                },
                {"sources": [layers("m1", 1, 4)]},
            ],
        }
    ),
    "linear over model+lora": Yaml(
        linear(model("m1+lora", weight=1), model("m2", weight=1), dtype="float32")
    ),
    "linear with base_model as a model": Yaml(
        linear(model("m1"), model("m2"), base_model="base", parameters={"weight": 1})
    ),
    "karcher with base_model as a model": Yaml(
        {
            "merge_method": "karcher",
            "base_model": "base",
            "models": [model("m1"), model("m2")],
            "dtype": "bfloat16",
        }
    ),
    "tokens: rows added, others padded": Yaml(
        arithmetic(*TUNED, tokenizer=TOKEN_ROWS | {"tokens": {}})
    ),
    "modules: default": Yaml(
        {**SLERP, "modules": {"default": {"models": [model("m1"), model("m2")]}}}
    ),
    "sce": Yaml(
        {
            "merge_method": "sce",
            "base_model": "base",
            "models": [model("m1"), model("m2"), model("m3")],
            "parameters": {"select_topk": 0.5},
            "dtype": "bfloat16",
        }
    ),
    "multislerp": Yaml(
        {
            "merge_method": "multislerp",
            "models": [model("m1", weight=1), model("m2", weight=1), model("m3", weight=2)],
            "dtype": "bfloat16",
        }
    ),
    "nearswap": Yaml(
        {
            "merge_method": "nearswap",
            "base_model": "m1",
            "models": [model("m1"), model("m2")],
            "parameters": {"t": 0.5},
            "dtype": "bfloat16",
        }
    ),
}
"""Further features of mergekit's files, each in a file of its own."""


def to_compared(yaml: Yaml) -> dict[str, Any]:
    """Return the file that both programs run: computed in float32, written in the file's dtype.

    mergekit computes in `dtype`, which here is only the dtype that is written.
    """
    config = dict(yaml.compared or yaml.config)
    dtype = config.pop("dtype", None)
    known = ("bfloat16", "float16", "float32", None)
    if dtype not in known or "gate_mode" in config:
        return config if dtype is None else config | {"dtype": dtype}
    return {"dtype": "float32", "out_dtype": dtype or "bfloat16"} | config


STRIDE = 7
"""Of tensors without a row per token, every seventh entry is compared."""


def sample(tensors: Mapping[str, torch.Tensor], ids: Mapping[str, int] | None) -> torch.Tensor:
    """Return some entries of all tensors in the order of their names, rows of tokens by token.

    mergekit numbers the tokens of a union in any order.
    """
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name]
        is_table = "embed_tokens" in name or name == "lm_head.weight"
        if is_table and ids is not None:
            tensor = tensor[[ids[token] for token in sorted(ids)]]
            parts.append(tensor.reshape(-1))
        else:
            parts.append(tensor.reshape(-1)[::STRIDE])
    return torch.cat(parts)


@dataclass(frozen=True)
class Output:
    """What is compared of a merged checkpoint."""

    entries: torch.Tensor
    facts: Mapping[str, Any]


def read_output(folder: Path, *, with_tokens: bool) -> Output:
    """Return what is compared of the checkpoint in a folder.

    Args:
        folder: of either program.
        with_tokens: whether the file asks for a tokenizer; mergekit writes none otherwise.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    facts: dict[str, Any] = {"num_layers": config["num_hidden_layers"], "names": len(tensors)}
    ids = None
    if with_tokens:
        raw = json.loads((folder / "tokenizer.json").read_text())
        ids = dict(raw["model"]["vocab"])
        ids |= {item["content"]: item["id"] for item in raw["added_tokens"]}
        facts |= {"vocab_size": config["vocab_size"], "tokens": sorted(ids)}
        facts |= {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        facts["template"] = read_template(folder)
    return Output(sample(tensors, ids), facts)


def read_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint, from either place that may hold it."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    template: str | None = json.loads((folder / "tokenizer_config.json").read_text()).get(
        "chat_template"
    )
    return template


def asks_for_tokens(config: Mapping[str, Any]) -> bool:
    """Return whether a file asks for a tokenizer."""
    return bool(config.get("tokenizer") or config.get("tokenizer_source"))


def count_units(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest distance in units in the last place of the larger of two values."""
    size = torch.maximum(ours.double().abs(), theirs.double().abs())
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[theirs.dtype]
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1 - bits)
    return float(((ours.double() - theirs.double()).abs() / unit).nan_to_num(0).max())


def make_table() -> str:
    """Return the table of docs/mergekit.md: what becomes of every file."""
    lines = ["| file | result |", "|---|---|"]
    for label, item in (PUBLISHED | FEATURES).items():
        result = "equal to mergekit's"
        if item.compared:
            result = "equal to mergekit's without random numbers"
        if item.refusal:
            result = "refused, by mergekit too" if item.mergekit_refuses else "refused"
        lines.append(f"| {label} | {result} |")
    lines.append("| several documents in one file | refused, by mergekit too |")
    return "\n".join(lines) + "\n"
