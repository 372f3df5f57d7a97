"""How an expert's class answers text without other inputs, measured on the class itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmerge.workers.modalities.decoder_inputs import capture_calls

_TOLERANCE = 0.02
"""Of a scale, relative: logits of bfloat16 are rounded to eight bits."""


@dataclass(frozen=True)
class TextRules:
    """What a class does with text that the base's class may do otherwise."""

    logit_scale: float | None
    """Logits divided by what the head returns; None where they are no multiple of it (soft caps).
    """
    is_prefix: bool
    """Whether all tokens of a text see each other."""

    def factor_to(self, other: TextRules) -> float | None:
        """Return by what logits scaled so must be multiplied to be scaled as those of `other`.

        None where no factor makes them so.
        """
        if self.logit_scale is None or other.logit_scale is None:
            return 1.0 if self.logit_scale == other.logit_scale else None
        factor = other.logit_scale / self.logit_scale
        return 1.0 if abs(factor - 1) < _TOLERANCE else factor


@torch.inference_mode()
def measure_text_rules(model: Any, *, token: int, owner: str) -> TextRules:
    """Return the rules of a class of transformers, from one forward pass of a text.

    Args:
        model: of any size; a language model of zero layers is enough.
        token: an id that the class takes for text.
        owner: the model, for errors.

    Raises:
        CheckpointError: the class hands its decoder what is not understood.
    """
    outputs: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    ids = torch.full((1, 3), token, device=model.device)
    handle = model.get_output_embeddings().register_forward_hook(note)
    try:
        with capture_calls(model) as calls:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    is_prefix = calls[0].is_prefix(ids.shape[1], owner=owner)
    return TextRules(_to_scale(outputs[-1].float(), logits.logits.float()), is_prefix)


def _to_scale(heads: torch.Tensor, logits: torch.Tensor) -> float | None:
    """Return the factor between what a head returned and the logits of the class."""
    scale = float((heads * logits).sum() / (heads * heads).sum())
    rest = (logits - scale * heads).norm() / logits.norm()
    if not float(rest) < _TOLERANCE:
        return None
    return 1.0 if abs(scale - 1) < _TOLERANCE else scale
