"""The configuration of the language model that a composite loads, from that of a whole model."""

from __future__ import annotations

from typing import Any

from mmerge.workers.families.plain_classes import to_plain_config

_OPEN = "use_bidirectional_attention"


def to_language_config(config: Any) -> Any:
    """Return the configuration of a model's language model, for its plain class.

    A plain model's is its own.
    """
    text = config.get_text_config()
    if text is config:
        return config
    plain = to_plain_config(text)
    plain.tie_word_embeddings = bool(
        getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    )
    if getattr(plain, _OPEN, None):
        # PaliGemma's layers take no mask for an open one. A composite makes all that are open.
        setattr(plain, _OPEN, getattr(type(plain)(), _OPEN))
    return plain
