"""Layer numbers in tensor names: the only place that knows how a name tells its layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class LayerName:
    """A tensor name split at its layer: `model.layers.3.mlp.up_proj.weight`."""

    prefix: str
    """Everything before the layer, with its dot: `model.`; may be empty."""
    layer: int
    """The layer's number: 3."""
    path: str
    """The name below the layer: `mlp.up_proj.weight`."""


def split_layer(name: str) -> LayerName | None:
    """Return a tensor name split at its layer, None for tensors outside the layers.

    These are embeddings, the last norm and the head. Of nested layers the outermost counts.
    """
    match = _LAYER.search(name)
    if match is None:
        return None
    start = match.start() + 1 if match[0].startswith(".") else match.start()
    return LayerName(name[:start], int(match[1]), name[match.end() :])


def move_layer(name: str, layer: int) -> str:
    """Return the name of a tensor in a layer with that of another layer."""
    match = _LAYER.search(name)
    if match is None:
        return name
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"


def layer_of(name: str) -> int | None:
    """Return the number of a tensor's layer, None for embeddings, the last norm and the head."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None
