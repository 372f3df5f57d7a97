"""A loaded language model on several ranks (tensor parallel) or several devices (by layers)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmerge.workers.composite.placement import Stage
from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.families.interface import Family


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are divided over ranks.

    Each rank looks up the tokens that it holds; the sum over ranks is the whole lookup.
    """

    def __init__(self, inner: nn.Embedding, group: ProcessGroup, *, start: int) -> None:
        """Make the embedding of a rank that holds the rows of `inner`, from token `start` on."""
        super().__init__()
        self.weight = inner.weight
        self._group, self._start = group, start

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., hidden] of token ids of the whole vocabulary."""
        local = tokens - self._start
        is_local = (local >= 0) & (local < len(self.weight))
        local = local.where(is_local, torch.zeros_like(local))
        embeds = nn.functional.embedding(local, self.weight)
        return self._group.all_reduce(embeds * is_local.unsqueeze(-1))


def apply_tensor_parallel(model: Any, group: ProcessGroup, plan: TensorParallelPlan) -> None:
    """Connect the parts of a model that each rank loaded.

    Outputs of layers divided by columns are all-reduced, those of the head all-gathered.
    """
    if group.num_ranks == 1:
        return
    for name, module in list(model.named_modules()):
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = plan.heads_per_rank // plan.kv_heads_per_rank
        if hasattr(module, "num_key_value_heads"):
            _set_local_heads(module, plan)
        if plan.family.sums_over_ranks(name):
            if group.rank:
                module.bias = None  # added once, by rank 0
            module.register_forward_hook(lambda module, args, output: group.all_reduce(output))
    vocabulary = int(model.config.vocab_size)
    start = plan.vocabulary_part(vocabulary, rank=group.rank).start
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(VocabParallelEmbedding(embedding, group, start=start))
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: group.all_gather(output)[..., :vocabulary]
    )


def _set_local_heads(module: Any, plan: TensorParallelPlan) -> None:
    """Set the number of heads of an attention that splits a fused projection to this rank's.

    Such a module reads the number of query heads from its configuration, which it shares with the
    whole model: it gets a copy.
    """
    module.num_key_value_heads = plan.kv_heads_per_rank
    module.config = copy.copy(module.config)
    module.config.num_attention_heads = plan.heads_per_rank
    module.config.num_key_value_heads = plan.kv_heads_per_rank


def place_layers(model: Any, stages: Sequence[Stage], *, family: Family) -> None:
    """Move hidden states from device to device along with the layers.

    Parameters of layers are on their stage's device already; the others are moved.
    """
    if not stages:
        return
    decoder = model.get_decoder()
    for stage in stages:
        for layer in decoder.layers[stage.first_layer : stage.last_layer + 1]:
            _move_inputs(layer, torch.device(stage.device))
    first, last = torch.device(stages[0].device), torch.device(stages[-1].device)
    embedding, head = model.get_input_embeddings().to(first), model.get_output_embeddings()
    decoder.rotary_emb.to(first)
    if head.weight is embedding.weight and first != last:
        # Tied weights need a copy on each device.
        head.weight = nn.Parameter(embedding.weight.detach().to(last), requires_grad=False)
    for module in (decoder.get_submodule(family.final_norm), head):
        _move_inputs(module.to(last), last)


def _move_inputs(module: nn.Module, device: torch.device) -> None:
    """Move the inputs of every forward pass of a module to a device."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    def move_all(
        module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return move(args), {name: move(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(move_all, with_kwargs=True)
