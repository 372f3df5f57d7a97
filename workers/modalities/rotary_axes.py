"""Which dimension of three-dimensional positions each rotary frequency follows (M-RoPE).

Qwen2-VL divides the frequencies into sections, Qwen3-VL interleaves them, others rotate a part of
each head alone. The rotary module of a class is asked instead of its configuration: rotated by
positions that differ from 0 in one dimension, exactly the frequencies of that dimension turn.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError

Layout = Literal["halves", "pairs"]
"""Order of the angles of n frequencies in a head: 0 … n-1 0 … n-1, or 0 0 1 1 … n-1 n-1."""


def find_axes(decoder: nn.Module, *, owner: str) -> tuple[int, ...]:
    """Return the dimension (0, 1 or 2) that each rotary frequency of a decoder follows.

    Raises:
        CheckpointError: its rotary module does not take positions of three dimensions.
    """
    try:
        units = torch.eye(3, dtype=torch.long).view(3, 3, 1, 1)
        turned = torch.stack([_rotate(decoder, unit) != 0 for unit in units])
        whole = _rotate(decoder, torch.ones(3, 1, 1, dtype=torch.long))
    except Exception as error:
        raise _refuse(decoder, f"{type(error).__name__}", owner=owner) from error
    if not (turned.sum(0) == 1).all():
        raise _refuse(decoder, "a frequency follows none or several dimensions", owner=owner)
    layout = find_layout(whole)
    axes = turned.to(torch.long).argmax(0)
    return tuple(_drop_copies(axes, layout).tolist())


def find_layout(sines: torch.Tensor) -> Layout:
    """Return the order of the angles of a head from their sines at one position, [angles]."""
    half = len(sines) // 2
    return "halves" if torch.equal(sines[:half], sines[half:]) else "pairs"


def to_layout(axes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the dimension of each angle, [..., 2·frequencies], from that of each frequency."""
    if layout == "halves":
        return torch.cat([axes, axes], dim=-1)
    return axes.repeat_interleave(2, dim=-1)


def _drop_copies(axes: torch.Tensor, layout: Layout) -> torch.Tensor:
    return axes[: len(axes) // 2] if layout == "halves" else axes[::2]


def _rotate(decoder: nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """Return the sines, [angles], of one token at a position int64 [3, 1, 1]."""
    rotary: Any = decoder.get_submodule("rotary_emb")
    device = next(rotary.buffers()).device
    sines: torch.Tensor = rotary(torch.zeros(1, device=device), positions.to(device))[1]
    return sines.reshape(-1).cpu()


def _refuse(decoder: nn.Module, reason: str, *, owner: str) -> CheckpointError:
    return CheckpointError(
        f"{owner}: its class gives positions of three dimensions, and the rotary embedding of"
        f" {type(decoder).__name__} does not say which frequency follows which ({reason}). Use that"
        " expert as its own class, from 'mmerge export --expert'"
    )
