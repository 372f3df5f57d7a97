"""AdaMMS: two experts that share an ancestor, interpolated; the coefficient chosen from answers
without labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.workers.families.registry import role_of
from mmerge.workers.methods.interface import Block, MergedBlock, Method, Parameters


def interpolate(target: torch.Tensor, source: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """Return (1 − α)·target + α·source, float32. AdaMMS (arXiv 2503.23733), section 3.2."""
    return (1 - alpha) * target + alpha * source


@dataclass(frozen=True)
class AlphaChoice:
    """Which coefficient the answers speak for."""

    alphas: tuple[float, ...]
    """The grid, ascending."""
    differences: tuple[int, ...]
    """How many answers change from each alpha of the grid to the next; one fewer than `alphas`."""
    best: tuple[float, ...]
    """The upper alpha of every pair of neighbours with the fewest changes, ascending."""

    @property
    def alpha(self) -> float:
        """The coefficient to use: the smallest of `best` (our choice where several pairs tie)."""
        return self.best[0]


def choose_alpha(answers: Mapping[float, Sequence[str]]) -> AlphaChoice:
    """Return the coefficient at which the answers of the merged model change least between
    neighbours.

    Needs no labels: answers count as equal when they are so but for upper and lower case. AdaMMS
    (arXiv 2503.23733), section 3.3.

    Args:
        answers: per alpha of the grid, the answers of the model merged with it, to the same
            questions in the same order.

    Raises:
        ValueError: fewer than two alphas, or their numbers of answers differ.
    """
    alphas = tuple(sorted(answers))
    if len(alphas) < 2:
        raise ValueError(
            f"alphas: neighbours are compared, so at least two are needed, got {len(alphas)}"
        )
    counts = {alpha: len(answers[alpha]) for alpha in alphas}
    if len(set(counts.values())) != 1 or not counts[alphas[0]]:
        raise ValueError(f"answers: every alpha needs one answer to each question, got {counts}")
    lowered = {alpha: [answer.lower() for answer in answers[alpha]] for alpha in alphas}
    differences = tuple(
        sum(lower != upper for lower, upper in zip(lowered[below], lowered[above], strict=True))
        for below, above in itertools.pairwise(alphas)
    )
    fewest = min(differences)
    best = tuple(
        above for above, count in zip(alphas[1:], differences, strict=True) if count == fewest
    )
    return AlphaChoice(alphas, differences, best)


class AdammsParameters(Parameters):
    """Parameters of AdaMMS."""

    alpha: float = Field(
        ge=0,
        le=1,
        description="share of the second expert; published grid 0 to 0.6 ('mmerge choose-alpha')",
    )
    norms: Literal["interpolate", "target"] = Field(
        "interpolate", description="interpolate the norms too, or keep the first expert's"
    )


class Adamms(Method):
    """θ = (1 − α)·θ₁ + α·θ₂ in the layers; embeddings and head stay the first expert's.

    The published script multiplies embeddings and head (and norms with --noLN) by 1 − α and adds
    nothing; here they are kept whole.
    """

    name = "adamms"
    kind = "plain"
    source = "AdaMMS, arXiv 2503.23733"
    parameters_model = AdammsParameters
    min_experts = 2
    max_experts = 2
    needs_base = False

    @override
    def merge_block(
        self, block: Block, parameters: AdammsParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        target, source = block.experts
        is_norm = len(block.shape) < 2 and "norm" in block.name
        role = role_of(block.name)
        if role is None and len(block.shape) == 2 and layer_of(block.name) is None:
            raise CheckpointError(
                f"{block.name}: no model family knows this tensor, and AdaMMS keeps embedding and"
                " head whole. If it is of an encoder or connector, list it under 'carry'; otherwise"
                " add a model family (docs/add-a-family.md)"
            )
        is_vocabulary = role in ("embedding", "head")
        if is_vocabulary or (is_norm and parameters.norms == "target"):
            return MergedBlock(target.to(block.dtype))
        return MergedBlock(interpolate(target, source, alpha=parameters.alpha).to(block.dtype))
