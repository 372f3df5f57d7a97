"""Checks of what enters the language model: token ids and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from mmerge.manifests.errors import PromptError
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
