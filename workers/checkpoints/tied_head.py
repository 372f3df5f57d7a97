"""Heads that share their weights with the embedding, though the files hold both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.reading import has_equal_bytes
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource
from mmerge.workers.families.registry import TEXT_CONFIG_KEYS, role_of


def is_surely_tied(config: Mapping[str, Any]) -> bool:
    """Return whether every part of a configuration that speaks of the head says that it is tied.

    Configurations of multimodal models often repeat the class's default at the top and contradict
    it in the language model's part; such a head counts as one of its own.
    """
    text_configs = [config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)]
    parts = [config, *text_configs]
    stated = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(stated) and all(stated)


def drop_tied_head(
    tensors: Mapping[str, TensorSource], config: Mapping[str, Any], *, where: str
) -> dict[str, TensorSource]:
    """Return the tensors of a checkpoint without a head that repeats the embedding it is tied to.

    Files written by older libraries or by hand hold such a copy. Kept, it would count twice in
    thresholds, and a merge could let the two drift apart. Bytes are read only where there is one.

    Raises:
        CheckpointError: the configuration ties the head, but the files hold another one. Which of
            the two the model uses depends on who loads it.
    """
    if not is_surely_tied(config):
        return dict(tensors)
    # Asked of every name once: half the time of a plan over 37,000 tensors was spent on roles.
    roles = {name: role_of(name) for name in tensors}
    heads = [name for name, role in roles.items() if role == "head"]
    embeddings = [name for name, role in roles.items() if role == "embedding"]
    if not heads or not embeddings:
        return dict(tensors)
    stores = OpenStores()
    for head in heads:
        if not any(
            has_equal_bytes(tensors[head], tensors[name], stores=stores) for name in embeddings
        ):
            raise CheckpointError(
                f"{where}: config.json ties the head to the embedding (tie_word_embeddings), but"
                f" {head} differs from {embeddings[0]}. Set tie_word_embeddings to false if the"
                f" head is its own, or take {head} out of the files"
            )
    return {name: source for name, source in tensors.items() if name not in heads}
