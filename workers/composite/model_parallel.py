"""A loaded language model put to work on several ranks (tensor parallelism) or several devices (by
layers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmerge.workers.composite.placement import Stage
from mmerge.workers.composite.process_group import Ranks
from mmerge.workers.composite.tensor_parallel import Division
from mmerge.workers.families.interface import Family


class DividedEmbedding(nn.Module):
    """Rows of an embedding on several ranks: each looks up the tokens it has, and the sum is the
    whole.
    """

    def __init__(self, inner: nn.Embedding, ranks: Ranks, *, start: int) -> None:
        super().__init__()
        self.weight = inner.weight
        self._ranks, self._start = ranks, start

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., hidden] of token ids of the whole vocabulary."""
        own = tokens - self._start
        is_own = (own >= 0) & (own < len(self.weight))
        found = nn.functional.embedding(own.where(is_own, torch.zeros_like(own)), self.weight)
        return self._ranks.add(found * is_own.unsqueeze(-1))


def join_ranks(model: Any, ranks: Ranks, division: Division) -> None:
    """Connect the parts of a model that each rank loaded: sums behind o and down, the head's
    columns next to each other.
    """
    if ranks.num_ranks == 1:
        return
    for name, module in list(model.named_modules()):
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = division.heads_per_rank // division.kv_heads_per_rank
        if hasattr(module, "num_key_value_heads"):
            _count_local_heads(module, division)
        if division.family.sums_over_ranks(name):
            if ranks.rank:
                module.bias = None  # the sum over ranks has it once
            module.register_forward_hook(lambda module, args, output: ranks.add(output))
    vocabulary = int(model.config.vocab_size)
    start = division.vocabulary_part(vocabulary, rank=ranks.rank).start
    model.set_input_embeddings(DividedEmbedding(model.get_input_embeddings(), ranks, start=start))
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: ranks.join(output)[..., :vocabulary]
    )


def _count_local_heads(module: Any, division: Division) -> None:
    """Let an attention that splits a fused projection count this rank's heads only.

    Such a module takes the number of query heads from its configuration, which it shares with the
    whole model: it gets a copy.
    """
    module.num_key_value_heads = division.kv_heads_per_rank
    module.config = copy.copy(module.config)
    module.config.num_attention_heads = division.heads_per_rank
    module.config.num_key_value_heads = division.kv_heads_per_rank


def spread_layers(model: Any, stages: Sequence[Stage], family: Family) -> None:
    """Let hidden states follow the layers from device to device; parameters are on their stage's
    device already.
    """
    if not stages:
        return
    decoder = model.get_decoder()
    for stage in stages:
        for layer in decoder.layers[stage.first_layer : stage.last_layer + 1]:
            _bring_inputs(layer, torch.device(stage.device))
    first, last = torch.device(stages[0].device), torch.device(stages[-1].device)
    embedding, head = model.get_input_embeddings().to(first), model.get_output_embeddings()
    decoder.rotary_emb.to(first)
    if head.weight is embedding.weight and first != last:
        head.weight = nn.Parameter(
            embedding.weight.detach().to(last), requires_grad=False
        )  # tied weights need a copy on each device
    for module in (decoder.get_submodule(family.final_norm), head):
        _bring_inputs(module.to(last), last)


def _bring_inputs(module: nn.Module, device: torch.device) -> None:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return move(args), {name: move(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(before, with_kwargs=True)
