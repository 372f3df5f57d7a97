"""Locate rules: what of one expert's task vector is kept, and rescaled.

Each rule is defined twice: `locate` in torch, which is the definition, and `record`, the parameters
of the kernel that computes the same bits (`locate_tile` and `merge_by_row` of workers/kernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mmerge.workers.kernels.locate import DROP, DROP_BY_RANK, KEEP_ALL, TOP, TRIM
from mmerge.workers.methods.randomness import stream_key, uniform
from mmerge.workers.methods.ranking import top_mask


class LocateRule(ABC):
    """What of one expert's task vector is kept in one tensor."""

    kind: ClassVar[int | None] = None
    """The kind of LOCATE_RULE; None for a rule without a kernel: its methods run in torch."""

    @abstractmethod
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        """Return a block of a task vector, float32, with zeros where it is not kept.

        Args:
            delta: the block, in the shape that the method's granularity gives it.
            start: flat position of its first entry within the whole tensor.
        """

    def record(self) -> Mapping[str, float]:
        """Return the fields of LOCATE_RULE that this kind reads."""
        return {}


@dataclass(frozen=True)
class KeepAll(LocateRule):
    """Everything is kept (task arithmetic)."""

    kind = KEEP_ALL

    @override
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        return delta


@dataclass(frozen=True)
class Trim(LocateRule):
    """Magnitudes at or above a threshold are kept, so ties stay in (TIES, MMER)."""

    threshold: float
    kind = TRIM

    @override
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        return trim(delta, threshold=self.threshold)

    @override
    def record(self) -> Mapping[str, float]:
        return {"threshold": self.threshold}


@dataclass(frozen=True)
class KeepTop(LocateRule):
    """Exact counts of largest magnitudes of a whole tensor: the `num_largest` largest are kept, but
    for the `num_outliers` largest of them (exact TIES, Breadcrumbs).

    Of equal magnitudes the lower position counts as the larger (our choice). The kernel works with
    the thresholds of both counts, which its pass over the tensor finds beforehand.
    """

    num_largest: int
    num_outliers: int = 0
    kind = TOP

    @override
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        magnitudes = delta.abs()
        mask = top_mask(magnitudes, self.num_largest) & ~top_mask(magnitudes, self.num_outliers)
        return torch.where(mask, delta, torch.zeros_like(delta))


@dataclass(frozen=True)
class Stream:
    """The random numbers of one expert's tensor, see `randomness`."""

    seed: int
    expert: str
    tensor: str

    def draw(self, like: torch.Tensor, *, start: int) -> torch.Tensor:
        """Return numbers in [0, 1), float32, of the shape of `like`, from position `start` on."""
        return uniform(self.seed, expert=self.expert, name=self.tensor, start=start, like=like)

    @property
    def key(self) -> int:
        """The key of the stream, unsigned."""
        return stream_key(self.seed, expert=self.expert, name=self.tensor) % (1 << 64)


@dataclass(frozen=True)
class DropAtRandom(LocateRule):
    """Entries are kept with one probability, the kept ones divided and multiplied.

    DARE (arXiv 2311.03099), section 3.1.
    """

    density: float
    """Probability of keeping an entry."""
    divisor: float
    factor: float
    stream: Stream
    kind = DROP

    @override
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        is_kept = self.stream.draw(delta, start=start) < self.density
        kept = torch.where(is_kept, delta, torch.zeros_like(delta))
        if self.divisor != 1.0:
            kept = kept / self.divisor
        return kept if self.factor == 1.0 else kept * self.factor

    @override
    def record(self) -> Mapping[str, float]:
        return {
            "density": self.density,
            "divisor": self.divisor,
            "factor": self.factor,
            "key": self.stream.key,
        }


@dataclass(frozen=True)
class DropByRank(LocateRule):
    """Entries are kept with a probability that is linear in the rank of their magnitude within the
    row, from density − ε to density + ε.

    DELLA (arXiv 2406.11617), section 3.1 (MAGPRUNE). Blocks are whole rows, [rows, columns].
    """

    density: float
    """Mean probability of keeping an entry."""
    epsilon: float
    divides: bool
    """Divide what is kept by its probability."""
    factor: float
    stream: Stream
    kind = DROP_BY_RANK

    @override
    def locate(self, delta: torch.Tensor, *, start: int) -> torch.Tensor:
        keep = keep_probabilities(delta, density=self.density, epsilon=self.epsilon)
        is_kept = self.stream.draw(delta, start=start) < keep
        values = delta / keep if self.divides else delta
        kept = torch.where(is_kept, values, torch.zeros_like(delta))
        return kept if self.factor == 1.0 else kept * self.factor

    @override
    def record(self) -> Mapping[str, float]:
        return {
            "density": self.density,
            "lowest": self.density - self.epsilon,
            "span": 2 * self.epsilon,
            "divides": self.divides,
            "factor": self.factor,
            "key": self.stream.key,
        }


def trim(delta: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Return `delta` with every entry of magnitude below `threshold` set to 0; ties at the
    threshold stay.

    TIES-Merging (arXiv 2306.01708), section 4, step 1.
    """
    zero = torch.zeros((), dtype=delta.dtype, device=delta.device)
    return torch.where(delta.abs() >= threshold, delta, zero)


def keep_probabilities(delta: torch.Tensor, *, density: float, epsilon: float) -> torch.Tensor:
    """Return the keep probability of every entry, float32 [rows, columns]: linear in its
    magnitude's rank within its row.

    DELLA (arXiv 2406.11617), section 3.1 (MAGPRUNE). Of equal magnitudes the lower position has the
    lower rank (our choice); a row of one entry has `density`.
    """
    columns = delta.shape[1]
    if columns == 1 or epsilon == 0:
        return torch.full_like(delta, density)
    order = torch.argsort(delta.abs(), dim=1, stable=True)
    steps = torch.arange(columns, dtype=torch.float32, device=delta.device).expand_as(delta)
    ranks = torch.empty_like(delta).scatter_(1, order, steps)
    return (density - epsilon) + ranks / (columns - 1) * (2 * epsilon)
