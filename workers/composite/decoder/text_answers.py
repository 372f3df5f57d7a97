"""Text alone, and logits, as the experts' class or as the base's class treats them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.modalities.text_rules import TextRules, measure_text_rules

_ROWS = 8
"""Rows of the vocabulary of a model that is made to be measured."""


def measure_base_rules(model: Any, *, owner: str) -> TextRules:
    """Return the rules of the class of a language model, measured on one without layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 0, _ROWS, None
    with torch.random.fork_rng(devices=[]):
        empty = type(model)(config).eval()
    return measure_text_rules(empty, token=0, owner=owner)


def choose_rules(base: TextRules, experts: Iterable[TextRules], *, is_routed: bool) -> TextRules:
    """Return the rules of a composite.

    Args:
        base: of the base's class.
        experts: of the classes of the loaded experts, those of the base where an expert has none.
        is_routed: whether each token is multiplied by weights of its modality. Text then has
            weights of no expert, and the base's rules; else those on which all experts agree.
    """
    rules = list(experts)
    is_agreed = not is_routed and bool(rules) and all(rule == rules[0] for rule in rules)
    return rules[0] if is_agreed else base


def scale_logits(model: Any, base: TextRules, rules: TextRules, *, owner: str) -> None:
    """Scale the logits of every forward pass of a model of the base's class by some rules.

    Raises:
        CheckpointError: no factor turns the logits of one class into those of the other.
    """
    factor = base.factor_to(rules)
    if factor is None:
        raise CheckpointError(
            f"{owner}: its class and {type(model).__name__} bound the logits differently, so a"
            " composite would answer wrongly. Use that expert as its own class, from 'mmerge export"
            " --expert'"
        )
    if factor == 1:
        return

    def scale(module: nn.Module, args: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits * factor
        return outputs

    model.register_forward_hook(scale)
