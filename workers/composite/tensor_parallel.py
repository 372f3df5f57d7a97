"""How each tensor of a language model is divided over the ranks of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmerge.manifests.errors import PlacementError

Along = Literal["rows", "columns", "whole"]
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor: entries `start` to `stop` of its rows or columns, padded with
    zeros to `size`.
    """

    along: Along
    start: int = 0
    stop: int = 0
    size: int = 0

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of this shape."""
        if self.along == "whole":
            return shape
        return (self.size, *shape[1:]) if self.along == "rows" else (*shape[:-1], self.size)


@dataclass(frozen=True)
class Division:
    """The heads, the width of the MLP and the vocabulary over `num_ranks` ranks (Megatron-LM, arXiv
    1909.08053, section 3).

    Rows of q, k, v, gate and up, columns of o and down; embedding and head by rows of the
    vocabulary; norms are whole on every rank. With fewer key-value heads than ranks, each is held
    by several.
    """

    num_ranks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Any, *, num_ranks: int) -> Division:
        """Return the division of a text model of transformers. Raises PlacementError when it cannot
        be divided evenly.
        """
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        made = cls(num_ranks, heads, kv_heads, head_dim, int(config.intermediate_size))
        fitting = [
            count
            for count in range(1, heads + 1)
            if cls(count, heads, kv_heads, head_dim, made.intermediate_size)._is_even()
        ]
        if num_ranks > 1 and not made._is_even():
            raise PlacementError(
                f"{heads} heads, {kv_heads} key-value heads and an MLP of {made.intermediate_size}"
                f" cannot be divided over {num_ranks} ranks; possible are"
                f" {', '.join(map(str, fitting))}"
            )
        return made

    def _is_even(self) -> bool:
        shares = self.num_kv_heads % self.num_ranks == 0 or self.num_ranks % self.num_kv_heads == 0
        return (
            self.num_heads % self.num_ranks == 0
            and self.intermediate_size % self.num_ranks == 0
            and shares
        )

    @property
    def kv_heads_per_rank(self) -> int:
        """Key-value heads that each rank holds."""
        return max(1, self.num_kv_heads // self.num_ranks)

    def part_of(self, name: str, shape: tuple[int, ...], *, rank: int) -> Part:
        """Return a rank's part of a tensor, given its name and shape.

        Raises:
            PlacementError: a matrix of a layer of which it is not known how it is divided.
        """
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if self.num_ranks == 1 or (kind == "bias" and last in _BY_COLUMNS):
            return Part("whole")
        if last in _VOCABULARY:
            each = -(-shape[0] // self.num_ranks)
            return Part("rows", min(rank * each, shape[0]), min((rank + 1) * each, shape[0]), each)
        if last in ("k_proj", "v_proj"):
            each = self.kv_heads_per_rank * self.head_dim
            start = (rank * self.num_kv_heads // self.num_ranks) * self.head_dim
            return Part("rows", start, start + each, each)
        if last in _BY_ROWS:
            return self._even("rows", shape[0], rank)
        if last in _BY_COLUMNS:
            return self._even("columns", shape[-1], rank)
        if len(shape) == 1:
            return Part("whole")
        raise PlacementError(
            f"{name} {shape}: it is not known how this matrix is divided over ranks. Load on one"
            " device, or by layers"
        )

    def _even(self, along: Along, size: int, rank: int) -> Part:
        each = size // self.num_ranks
        return Part(along, rank * each, (rank + 1) * each, each)
