"""The family of models whose names no other family knows: decided from shapes, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, PlacementError
from mmerge.manifests.format.tensor_names import split_layer
from mmerge.workers.families.interface import REPLICATED, Family, ParallelRule, Shapes

_DEFAULT_HEAD = "lm_head.weight"
_REMEDY = "Add its names as a model family (docs/add-a-family.md)"


@dataclass(frozen=True)
class GenericFamily(Family):
    """A language model whose projections are unknown.

    Every matrix named `weight` in a layer counts as a Linear layer, which the loader checks against
    the model's own modules. What needs more (`merge: linear`, tensor parallelism) is refused.
    """

    @override
    def is_routed_linear(self, path: str, shape: Sequence[int]) -> bool:
        return split_layer(f"{path}.weight") is not None and len(shape) == 2

    @override
    def rule_of(self, name: str, shape: Sequence[int]) -> ParallelRule:
        if split_layer(name) is None:
            return REPLICATED  # every model has layers, and those are refused
        raise PlacementError(
            f"{name} {tuple(shape)}: no model family knows this tensor's name, so it cannot be"
            f" split over devices. Load on one device. {_REMEDY}"
        )


def make_generic(shapes: Shapes, text_config: Mapping[str, Any], *, where: str) -> GenericFamily:
    """Return the generic family of a language model, its embedding and head found by shape.

    Args:
        shapes: by name, of all tensors of a base model.
        text_config: its text configuration; `vocab_size` tells the embedding from others.
        where: names the checkpoint in errors.

    Raises:
        CheckpointError: there are no layers, or embedding or head cannot be told apart.
    """
    model_type = text_config.get("model_type", "of unknown type")
    splits = [split for split in map(split_layer, shapes) if split is not None]
    if not splits:
        raise CheckpointError(
            f"{where}: language model {model_type!r} is not supported: none of its tensors is named"
            f" …layers.NUMBER.…, the first is {min(shapes, default='(none)')}. Layers must be named"
            " so; other names can be added as a model family (docs/add-a-family.md)"
        )
    vocab_size = text_config.get("vocab_size")
    outside = [
        name for name, shape in shapes.items() if len(shape) == 2 and split_layer(name) is None
    ]
    weights = [name for name in outside if name.endswith(".weight")]
    exact = [name for name in weights if shapes[name][0] == vocab_size]
    prefixes = sorted({split.prefix for split in splits}, key=lambda text: (len(text), text))
    # Encoders of a multimodal base have layers, too: the language model has the vocabulary.
    prefix = next(
        (prefix for prefix in prefixes if any(name.startswith(prefix) for name in exact)),
        prefixes[0],
    )
    embeddings = [name for name in exact if name.startswith(prefix)]
    if not embeddings:
        # Padded rows. Position embeddings may have any number of them.
        embeddings = [
            name
            for name in weights
            if name.startswith(prefix)
            and (not isinstance(vocab_size, int) or shapes[name][0] > vocab_size)
        ]
    if len(embeddings) != 1:
        raise CheckpointError(
            f"{where}: language model {model_type!r} is not supported: its embedding cannot be told"
            f" from the shapes (vocab_size {vocab_size}; candidates:"
            f" {', '.join(sorted(embeddings)) or 'none'}). {_REMEDY}"
        )
    embedding = embeddings[0]
    heads = [
        name
        for name in outside
        if name != embedding and tuple(shapes[name]) == tuple(shapes[embedding])
    ]
    if len(heads) > 1:
        raise CheckpointError(
            f"{where}: language model {model_type!r} is not supported: its head may be any of"
            f" {', '.join(sorted(heads))}. {_REMEDY}"
        )
    return GenericFamily(
        name="generic",
        model_types=(str(model_type),),
        projections=(),
        embedding=embedding[len(prefix) :],
        head=heads[0] if heads else _DEFAULT_HEAD,
        body=prefix,
    )
