"""LoRA twins of the experts: frozen base, a connector, two adapters in every Linear.

One adapter serves the modality's tokens, the other text.

They are tuned as Model Composition (arXiv 2402.12750) tunes its experts, with learned tokens around
each medium, and written as PEFT does. Their frozen encoders are those of the experts and stand in
no twin's files: a prompt holds features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from lab import models, tasks
from lab.batches import Batch, Collator, encode, preprocess
from lab.evaluate import accuracy, load_checkpoint
from lab.fitting import answer_loss, fit, make_expert_prompt, stream_batches
from lab.pools import encode_pool, make_pool
from lab.sizes import Size
from mmerge.pipeline import Part

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EDGE = 2  # learned tokens on either side of a medium
DEFAULT = "default"
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


class TwoAdapters(nn.Module):
    """A frozen Linear with an adapter for the modality's tokens and one for all others."""

    def __init__(
        self,
        linear: nn.Linear,
        places: list[Tensor],
        *,
        rank: int,
        alpha: int,
        names: tuple[str, str],
    ) -> None:
        """`places` holds one tensor, [rows, length]: where the modality's tokens are."""
        super().__init__()
        self.linear, self.places, self.scale, self.names = linear, places, alpha / rank, names
        self.a = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
                for name in names
            }
        )
        self.b = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(linear.out_features, rank)) for name in names}
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """y = W x + s·B A x, with the adapter of each token."""
        of_modality, of_text = (
            self.scale * (inputs @ self.a[name].T @ self.b[name].T) for name in self.names
        )
        return self.linear(inputs) + torch.where(self.places[0][..., None], of_modality, of_text)


class Twin(nn.Module):
    """The base with adapters, a connector and learned tokens around a medium."""

    edges = 2 * EDGE

    def __init__(
        self, modality: str, base: LlamaForCausalLM, connector: Sequence[nn.Module], *, rank: int
    ) -> None:
        super().__init__()
        self.modality, self.rank, self.alpha = modality, rank, 2 * rank
        self.base = base.requires_grad_(False)
        self.places: list[Tensor] = [torch.zeros(1, 1, dtype=torch.bool)]
        self.adapters: dict[str, TwoAdapters] = {}
        for path, module in list(base.named_modules()):
            if path.rsplit(".", 1)[-1] in LINEARS and isinstance(module, nn.Linear):
                adapted = TwoAdapters(
                    module, self.places, rank=rank, alpha=self.alpha, names=(modality, DEFAULT)
                )
                parent, _, name = path.rpartition(".")
                setattr(base.get_submodule(parent), name, adapted)
                self.adapters[path] = adapted
        self.connector = nn.Sequential(*connector)
        self.prefix = nn.Parameter(0.02 * torch.randn(EDGE, base.config.hidden_size))
        self.suffix = nn.Parameter(0.02 * torch.randn(EDGE, base.config.hidden_size))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.prefix.device

    def find_parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The language model without its head, the head, and the connector."""
        return self.base.model, self.base.lm_head, self.connector

    def embed(self, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        """Return token embeddings with the inputs' embeddings in place.

        From here on each token runs through its own adapter.
        """
        embeddings = self.base.get_input_embeddings()(batch.ids.to(self.device))
        self.places[0] = batch.media.to(self.device)
        if len(batch.pool_rows) == 0:
            return embeddings
        media = [
            torch.cat([self.prefix, self.connector(row[:length].to(self.device)), self.suffix])
            for row, length in zip(features, lengths.tolist(), strict=True)
        ]
        return embeddings.masked_scatter(self.places[0][..., None], torch.cat(media))

    def trained(self) -> list[nn.Parameter]:
        """All parameters that are tuned."""
        return [p for p in self.parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        """Write default adapter, connector and learned tokens; modality adapter in a subfolder."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
        }
        config |= {
            "bias": "none",
            "target_modules": list(LINEARS),
            "base_model_name_or_path": None,
            "inference_mode": True,
        }
        others = {
            f"modal_projectors.{self.modality}.{name}": value
            for name, value in self.connector.state_dict().items()
        }
        others |= {
            f"prefix_tokens.{self.modality}": self.prefix[None],
            f"suffix_tokens.{self.modality}": self.suffix[None],
        }
        for adapter, place, more in (
            (DEFAULT, folder, others),
            (self.modality, folder / self.modality, {}),
        ):
            tensors = {f"base_model.model.{name}": value for name, value in more.items()}
            for path, module in self.adapters.items():
                tensors[f"base_model.model.{path}.lora_A.weight"] = module.a[adapter]
                tensors[f"base_model.model.{path}.lora_B.weight"] = module.b[adapter]
            place.mkdir(parents=True, exist_ok=True)
            rounded = {
                name: value.detach().to("cpu", torch.bfloat16).contiguous()
                for name, value in tensors.items()
            }
            save_file(rounded, place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_config.json").write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n"
            )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        with torch.no_grad():
            for adapter, place in ((DEFAULT, folder), (self.modality, folder / self.modality)):
                tensors = {
                    n.removeprefix("base_model.model."): v.float()
                    for n, v in load_file(place / "adapter_model.safetensors").items()
                }
                for path, module in self.adapters.items():
                    module.a[adapter].copy_(tensors.pop(f"{path}.lora_A.weight"))
                    module.b[adapter].copy_(tensors.pop(f"{path}.lora_B.weight"))
                if adapter == DEFAULT:
                    self.prefix.copy_(tensors.pop(f"prefix_tokens.{self.modality}")[0])
                    self.suffix.copy_(tensors.pop(f"suffix_tokens.{self.modality}")[0])
                    self.connector.load_state_dict(
                        {
                            n.removeprefix(f"modal_projectors.{self.modality}."): v
                            for n, v in tensors.items()
                        }
                    )


def _copy_connector(modality: str, expert: PreTrainedModel) -> list[nn.Module]:
    """The expert's connector as a list of layers: a start from which the twin's own is tuned."""
    if modality == "point":
        return list(expert.modal_projectors["point"])
    connector = expert.model.multi_modal_projector
    if modality == "audio":
        return [connector.linear]
    return [connector.linear_1, nn.GELU(), connector.linear_2]


def build_twin(modality: str, out: Path, *, rank: int) -> Twin:
    """A twin of the expert in `out`, its adapters still without effect."""
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype="float32", trust_remote_code=False)
    return Twin(
        modality,
        base,
        _copy_connector(modality, load_checkpoint(modality, out / modality)[0]),
        rank=rank,
    )


def train_twin(modality: str, out: Path, size: Size, *, seed: int, device: torch.device) -> None:
    """Tune two adapters per Linear, the connector and the learned tokens on one modality."""
    torch.manual_seed(seed + 3)
    rng = np.random.default_rng([seed, 5, tasks.MODALITIES.index(modality)])
    expert = load_checkpoint(modality, out / modality)[0].to(device)
    pool = make_pool(
        modality, models.build_preprocessor(modality), pool_size=size.pool // 4, seed=seed
    )
    encode_pool(modality, expert, pool)
    twin = build_twin(modality, out, rank=size.lora_rank).to(device)
    tokenizer = AutoTokenizer.from_pretrained(out / "base", trust_remote_code=False)
    collate = Collator(tokenizer.get_vocab(), modality, pool, edges=Twin.edges)
    batches = stream_batches(
        lambda: make_expert_prompt(modality, rng), collate, rng=rng, batch_size=size.expert_batch
    )
    assert pool.features is not None
    pool_features, pool_lengths = pool.features, pool.lengths
    language_model, head, _ = twin.find_parts()

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        embeddings = twin.embed(
            batch, pool_features[batch.pool_rows], pool_lengths[batch.pool_rows]
        )
        return answer_loss(language_model, head, embeddings, batch, end_id=tokenizer.eos_token_id)

    fit(
        f"{modality} twin",
        [{"params": twin.trained(), "lr": size.twin_rate, "weight_decay": 0.0}],
        loss_of_step,
        size.twin_steps[modality],
    )
    twin.save(out / "twins" / modality)


def score_twin(modality: str, out: Path, examples: Sequence[tasks.Example]) -> dict[str, float]:
    """Share of right answers of the twin in `out`, as it was tuned, for each task."""
    config = json.loads((out / "twins" / modality / "adapter_config.json").read_text())
    twin = build_twin(modality, out, rank=config["r"]).eval()
    twin.load(out / "twins" / modality)
    expert = load_checkpoint(modality, out / modality)[0]
    tokenizer = AutoTokenizer.from_pretrained(out / "base", trust_remote_code=False)
    return accuracy(
        modality, expert, tokenizer, models.build_preprocessor(modality), examples, answerer=twin
    )


@cache
def _expert(modality: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    return load_checkpoint(modality, folder / modality)[0], models.build_preprocessor(modality)


@torch.no_grad()
def to_features(modality: str, value: Any, *, checkpoints: Path = CHECKPOINTS) -> np.ndarray:
    """What the frozen encoder of a modality makes of one medium: float32 [tokens, width]."""
    expert, preprocessor = _expert(modality, checkpoints)
    features, lengths = encode(modality, expert, preprocess(modality, preprocessor, [value]))
    return features[0, : int(lengths[0])].numpy()


def with_features(
    parts: Sequence[tasks.Part | Part], *, checkpoints: Path = CHECKPOINTS
) -> list[Part]:
    """The parts of a prompt with features in place of media, as a composite of twins takes them."""
    return [
        Part(
            part.kind,
            (
                part.value
                if part.kind == "text"
                else to_features(part.kind, part.value, checkpoints=checkpoints)
            ),
        )
        for part in parts
    ]
