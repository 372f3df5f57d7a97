"""Tensors of an expert's language model that the base lacks: a head of its own, biases, norms."""

from __future__ import annotations

from collections.abc import Iterable

from mmerge.manifests.format.tensor_names import split_layer
from mmerge.workers.families.registry import role_of

_BUFFERS = ("rotary_emb.inv_freq",)
"""Ends of tensors that are computed from the configuration, and that old files hold as well."""


def find_expert_only(
    names: Iterable[str],
    *,
    base_names: Iterable[str],
    renames: Iterable[tuple[str, str]],
) -> list[str]:
    """Return the names of the expert's language-model tensors that the base lacks, sorted.

    Encoders, connectors and learned tokens are none of them: only what lies in the layers, in the
    last norm and in the head of the expert's language model counts. Layers of cross-attention
    (Mllama) are connectors: tokens of text skip them.

    Args:
        names: of tensors in the expert's files.
        base_names: of the base's tensors, as the expert's files name them.
        renames: (name in the base, name in the expert's files): prefixes that end with a dot (or
            are empty), and whole names, such as that of the head.
    """
    shared = set(base_names)
    pairs = list(renames)
    prefixes = {prefix for base, prefix in pairs if not base or base.endswith(".")}
    whole_names = {name for base, name in pairs if base and not base.endswith(".")}
    names = list(names)
    connectors = tuple(_find_cross_attention(names))
    return sorted(
        name
        for name in names
        if name not in shared
        and not name.endswith(_BUFFERS)
        and not (connectors and name.startswith(connectors))
        and (name in whole_names or _is_in_decoder(name, prefixes))
    )


def _find_cross_attention(names: Iterable[str]) -> set[str]:
    """Return the prefixes of whole layers that attend to an encoder's states."""
    layers = set()
    for name in names:
        split = split_layer(name)
        if split is not None and split.path.startswith("cross_attn."):
            layers.add(name[: len(name) - len(split.path)])
    return layers


def _is_in_decoder(name: str, prefixes: set[str]) -> bool:
    """Return whether a tensor is in a layer or the last norm directly below a prefix."""
    split = split_layer(name)
    if split is not None:
        return split.prefix in prefixes
    module = name.rpartition(".")[0]
    is_below_prefix = any(f"{prefix}{module.rpartition('.')[2]}" == module for prefix in prefixes)
    return is_below_prefix and role_of(name) == "final_norm"


def describe_names(names: list[str]) -> str:
    """Return the first name, and how many there are besides."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
