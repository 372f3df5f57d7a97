"""Prompts as tensors: checks of what enters the language model, and batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from mmerge.manifests.errors import PromptError
from mmerge.workers.composite.routing import TEXT
from mmerge.workers.modalities.prompt import Part, check_text


def check_finite(embeddings: torch.Tensor, part: Part, *, expert: str) -> None:
    """Raise PromptError if an input gives embeddings that are NaN or infinite.

    Features of any array can overflow the dtype of the model, or within the connector.
    """
    if not torch.isfinite(embeddings).all():
        raise PromptError(
            f"{part.kind}: the encoder of expert {expert!r} gives embeddings that are NaN or"
            f" infinite in {str(embeddings.dtype).removeprefix('torch.')}. Its input has NaN or too"
            " large numbers"
        )


def to_tokens(part: Part, tokenizer: Any, *, num_tokens: int) -> Sequence[int]:
    """Return the token ids of a part of kind `text` or `ids`.

    Raises:
        PromptError: the text cannot be tokenised, or an id is not in the vocabulary.
    """
    ids: Sequence[Any]
    if part.kind == "text":
        check_text(part.value)
        ids = tokenizer(part.value, add_special_tokens=False)["input_ids"]
    else:
        ids = part.value
    for token in ids:
        is_id = isinstance(token, Integral) and not isinstance(token, bool)
        if not is_id or not 0 <= int(token) < num_tokens:
            raise PromptError(f"ids: expected token ids from 0 to {num_tokens - 1}, got {token!r}")
    return ids


def pad_prompts(
    embedded: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a batch of prompts, each given by its embeddings and modality ids.

    Embeddings [batch, tokens, hidden], modality ids and attention mask, int64 [batch, tokens].
    """
    length = max(len(ids) for _, ids in embedded)
    first_embeds, first_ids = embedded[0]
    embeds = first_embeds.new_zeros(len(embedded), length, first_embeds.shape[-1])
    ids = torch.full((len(embedded), length), TEXT, dtype=torch.long, device=first_ids.device)
    mask = torch.zeros_like(ids)
    for row, (values, modality_ids) in enumerate(embedded):
        start = length - len(modality_ids)
        embeds[row, start:] = values
        ids[row, start:] = modality_ids
        mask[row, start:] = 1
    return embeds, ids, mask
