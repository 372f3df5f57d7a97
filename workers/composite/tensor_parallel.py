"""Tensor-parallel plan: the part of each tensor of a language model that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmerge.manifests.errors import PlacementError
from mmerge.workers.families.interface import Family, FusedPart

Along = Literal["rows", "columns", "whole"]


@dataclass(frozen=True)
class TensorPart:
    """One rank's part of a tensor: ranges of its rows or columns, padded with zeros to `size`."""

    along: Along
    ranges: tuple[tuple[int, int], ...] = ()
    """(start, stop) of each range, in order; several for the parts of a fused projection."""
    size: int = 0

    @property
    def start(self) -> int:
        """First row or column of the first range."""
        return self.ranges[0][0]


@dataclass(frozen=True)
class TensorParallelPlan:
    """Heads, MLP width and vocabulary divided over `num_ranks` ranks.

    Megatron-LM (arXiv 1909.08053, section 3). The family of the model has the rule of each tensor:
    rows of query, key, value, gate and up, columns of attention output and down; embedding and head
    by rows of the vocabulary; norms whole on every rank. With fewer key-value heads than ranks,
    several ranks hold the same head.
    """

    num_ranks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    family: Family

    @classmethod
    def from_config(cls, config: Any, *, family: Family, num_ranks: int) -> TensorParallelPlan:
        """Return the plan for a text configuration of transformers.

        Raises:
            PlacementError: heads or MLP width are not divisible by `num_ranks`.
        """
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        intermediate_size = int(getattr(config, "intermediate_size", None) or 0)
        plans = {
            count: cls(count, heads, kv_heads, head_dim, intermediate_size, family)
            for count in {num_ranks, *range(1, heads + 1)}
        }
        if num_ranks > 1 and not plans[num_ranks]._is_even():
            possible = [str(count) for count in range(1, heads + 1) if plans[count]._is_even()]
            raise PlacementError(
                f"{heads} heads, {kv_heads} key-value heads and an MLP of {intermediate_size}"
                f" cannot be divided over {num_ranks} ranks; possible are {', '.join(possible)}"
            )
        return plans[num_ranks]

    def _is_even(self) -> bool:
        kv_heads_fit = (
            self.num_kv_heads % self.num_ranks == 0 or self.num_ranks % self.num_kv_heads == 0
        )
        return (
            self.num_heads % self.num_ranks == 0
            and self.intermediate_size % self.num_ranks == 0
            and kv_heads_fit
        )

    @property
    def heads_per_rank(self) -> int:
        """Attention heads that each rank holds."""
        return self.num_heads // self.num_ranks

    @property
    def kv_heads_per_rank(self) -> int:
        """Key-value heads that each rank holds."""
        return max(1, self.num_kv_heads // self.num_ranks)

    def vocabulary_part(self, num_rows: int, *, rank: int) -> TensorPart:
        """Return a rank's rows of the vocabulary; the last rank's are padded."""
        size = -(-num_rows // self.num_ranks)
        start, stop = (min(index * size, num_rows) for index in (rank, rank + 1))
        return TensorPart("rows", ((start, stop),), size)

    def part_of(self, name: str, shape: tuple[int, ...], *, rank: int) -> TensorPart:
        """Return a rank's part of a tensor, given its name and shape.

        Raises:
            PlacementError: the family has no rule for the tensor, or its rows do not fit the rule.
        """
        if self.num_ranks == 1:
            return TensorPart("whole")
        rule = self.family.rule_of(name, shape)
        if rule.along == "replicated":
            return TensorPart("whole")
        if rule.along == "vocabulary":
            return self.vocabulary_part(shape[0], rank=rank)
        if rule.along == "columns":
            start, stop = self._even_range(shape[-1], rank)
            return TensorPart("columns", ((start, stop),), stop - start)
        num_even = rule.parts.count("even")
        fixed = sum(self._num_rows(part) for part in rule.parts if part != "even")
        even_rows = (shape[0] - fixed) // num_even if num_even else 0
        if fixed + num_even * even_rows != shape[0]:
            raise PlacementError(
                f"{name} {shape}: its rows are not those of {self.num_heads} heads and"
                f" {self.num_kv_heads} key-value heads of {self.head_dim} entries. Load on one"
                " device, or by layers"
            )
        ranges, offset = [], 0
        for part in rule.parts:
            num_rows = even_rows if part == "even" else self._num_rows(part)
            start, stop = self._range_of(part, num_rows, rank)
            ranges.append((offset + start, offset + stop))
            offset += num_rows
        return TensorPart("rows", tuple(ranges), sum(stop - start for start, stop in ranges))

    def _num_rows(self, part: FusedPart) -> int:
        return (self.num_heads if part == "heads" else self.num_kv_heads) * self.head_dim

    def _range_of(self, part: FusedPart, num_rows: int, rank: int) -> tuple[int, int]:
        if part != "kv_heads":
            return self._even_range(num_rows, rank)
        start = (rank * self.num_kv_heads // self.num_ranks) * self.head_dim
        return start, start + self.kv_heads_per_rank * self.head_dim

    def _even_range(self, size: int, rank: int) -> tuple[int, int]:
        share = size // self.num_ranks
        return rank * share, (rank + 1) * share
