"""Tiny random composite models of real transformers classes, and a naive model.

The naive model computes token by token, without cache or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS = ("image", "audio", "video")
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 42,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    # Its files hold one matrix per expert, its class holds them fused.
    "mixtral": {
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    # Names other than LLaMA's: see tests/workers/families.
    "phi3": {"tie_word_embeddings": False},
    "gpt_neox": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "starcoder2": {"tie_word_embeddings": False},
    # No family knows these names.
    "phi": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
}
_STORED_NAMES = {"embed_out.weight": "lm_head.weight"}
"""Names in the files of GPT-NeoX whose parameters are called otherwise in its class."""
RANK = 3


def is_layer_matrix(name: str, value: torch.Tensor) -> bool:
    return ".layers." in name and value.ndim == 2


def write_tokenizer(folder: Path) -> None:
    """Forty-two words, w0 to w41; w1 begins, w2 ends."""
    words = Tokenizer(
        WordLevel({f"w{index}": index for index in range(_SIZES["vocab_size"])}, unk_token="w0")
    )
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0"
    )
    tokenizer.save_pretrained(folder)


def make_model(architecture: str, *, seed: int = 0, **sizes: Any) -> Any:
    """Return a tiny model of a real class with every parameter random.

    Biases and norms too, which are 0 and 1 in a new model.
    """
    config = transformers.AutoConfig.for_model(
        architecture, **(_SIZES | _OWN[architecture] | sizes)
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = 0.2 if parameter.ndim > 1 else 0.3
        parameter.data = (parameter.ndim == 1) * 0.5 + spread * torch.randn(
            parameter.shape, generator=generator
        )
    model.tie_weights()
    return model


def write_family(
    folder: Path, architecture: str, *, experts: Sequence[str] = EXPERTS, **sizes: Any
) -> dict[str, torch.Tensor]:
    """Write a base and experts tuned from it; return the base's tensors."""
    base = make_model(architecture, **sizes)
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    for number, name in enumerate(experts):
        generator = torch.Generator().manual_seed(100 + number)
        (folder / name).mkdir()
        tuned = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in tensors.items()
        }
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        write_tokenizer(folder / name)
    return tensors


def write_adapters(
    folder: Path, tensors: dict[str, torch.Tensor], *, experts: Sequence[str] = EXPERTS
) -> None:
    """Write experts with decoupled LoRA adapters in all Linears, as PEFT saves them."""
    for number, name in enumerate(experts):
        generator = torch.Generator().manual_seed(200 + number)
        for place in (
            folder / name,
            folder / name / name,
        ):  # the default adapter, and the modality's in a folder of its name
            place.mkdir()
            factors = {}
            for key, value in tensors.items():
                if is_layer_matrix(key, value):
                    path = f"base_model.model.{key.removesuffix('.weight')}"
                    factors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(
                        (RANK, value.shape[1]), generator=generator
                    )
                    factors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(
                        (value.shape[0], RANK), generator=generator
                    )
            save_file(factors, place / "adapter_model.safetensors")
            (place / "adapter_config.json").write_text(
                f'{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": 6}}'
            )


def build_masks(folder: Path, architecture: str, **sizes: Any) -> str:
    """A composite of masks (MMER) over a base and three experts; its URI."""
    write_family(folder, architecture, **sizes)
    return build(
        folder,
        {
            "method": "mmer",
            "density": 0.7,
            "experts": {n: {"path": n, "modality": n} for n in EXPERTS},
        },
    )


def build_plain(folder: Path, architecture: str) -> str:
    """A plain merge of a base and three experts (task arithmetic); its URI."""
    write_family(folder, architecture)
    return build(
        folder,
        {
            "method": "task_arithmetic",
            "scale": 0.4,
            "experts": {n: {"path": n, "modality": n} for n in EXPERTS},
        },
    )


def build_adapters(folder: Path, architecture: str) -> str:
    """A composite of adapters (DAMC); its URI."""
    tensors = write_family(folder, architecture, experts=())
    write_adapters(folder, tensors)
    return build(
        folder, {"method": "damc", "experts": {n: {"path": n, "modality": n} for n in EXPERTS}}
    )


def build(folder: Path, raw: dict[str, Any]) -> str:
    """Run a recipe over `base` and the experts in a folder; return the store's URI."""
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"name": "tiny", "base": "base", "output": "store"} | raw, sort_keys=False)
    )
    run(make_plan(read_recipe(path)))
    return str(folder / "store")


class NaiveLinear(nn.Module):
    """y = W x + b with the weight and bias of each token's modality, one token after the other."""

    def __init__(
        self,
        weights: dict[int, torch.Tensor],
        biases: dict[int, torch.Tensor] | None,
        ids: list[int],
    ) -> None:
        super().__init__()
        self.weights, self.biases, self.ids = weights, biases, ids

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.shape[:2] == (1, len(self.ids))
        outputs = []
        for token, modality in zip(inputs[0], self.ids, strict=True):
            output = self.weights[modality] @ token
            outputs.append(output if self.biases is None else output + self.biases[modality])
        return torch.stack(outputs)[None]


class Naive:
    """The naive composite model: every token multiplied alone.

    Each modality's weights are formed explicitly from the stored bytes.
    """

    def __init__(self, uri: str, architecture: str, **sizes: Any) -> None:
        self.reader = BuildReader(uri)
        self.model = make_model(architecture, **sizes)
        self.ids: list[int] = []
        state = {
            _STORED_NAMES.get(name, name): self._weight(name, -1)
            for name in self.reader.llm_names()
        }
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied, where it is in no file
        self.model.tie_weights()
        for path, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in path:
                weights = {
                    index: self._weight(f"{path}.weight", index)
                    for index in range(-1, len(EXPERTS))
                }
                biases = (
                    None
                    if module.bias is None
                    else {i: self._weight(f"{path}.bias", i) for i in range(-1, len(EXPERTS))}
                )
                parent, _, child = path.rpartition(".")
                setattr(
                    self.model.get_submodule(parent), child, NaiveLinear(weights, biases, self.ids)
                )

    def _weight(self, name: str, modality: int) -> torch.Tensor:
        base = self.reader.read(name, "base")
        if self.reader.manifest.kind == "adapters":
            return self._adapted(base, name, modality)
        delta = self.reader.read(name, "delta")
        masks = [
            unpack_mask(self.reader.read_packed_mask(name, expert), base.shape).float()
            for expert in EXPERTS
        ]
        return base + (sum(masks) / len(masks) if modality == -1 else masks[modality]) * delta

    def _adapted(self, base: torch.Tensor, name: str, modality: int) -> torch.Tensor:
        if not is_layer_matrix(name, base):
            return base
        chosen = (
            [(expert, "default", 1 / len(EXPERTS)) for expert in EXPERTS]
            if modality == -1
            else [(EXPERTS[modality],) * 2 + (1.0,)]
        )
        formed = base.clone()
        for expert, adapter, coefficient in chosen:
            path = f"{name.removesuffix('.weight')}.lora_%s.{adapter}.weight"
            a, b = (self.reader.read(path % factor, "adapter", expert) for factor in "AB")
            formed += coefficient * (6 / RANK) * (b @ a)
        return formed

    @torch.inference_mode()
    def logits(
        self, embeds: torch.Tensor, ids: list[int], answer: Sequence[int] = ()
    ) -> torch.Tensor:
        """Return logits [tokens, vocabulary] of a prompt and following text, in one pass."""
        self.ids[:] = [*ids, *[-1] * len(answer)]
        tail = self.model.get_input_embeddings()(torch.tensor(list(answer), dtype=torch.long))
        logits: torch.Tensor = self.model(
            inputs_embeds=torch.cat([embeds, tail])[None], use_cache=False
        ).logits[0]
        return logits
