"""Names of the tensors in an adapter's files: parts of adapters, and tensors saved whole."""

from __future__ import annotations

import re

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
EMBEDDING_FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_embedding_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?$"
)
_MAGNITUDE = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>magnitude)_vector"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$"
)
TOKEN_ROWS = re.compile(
    r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?$"
)
_WRAPPERS = re.compile(
    r"\.(token_adapter|base_layer|original_module|modules_to_save(\.default)?)(?=\.)"
)
"""What PEFT puts into the names of tensors that it saves whole."""
NESTED = re.compile(r"(\.base_layer)+$")
"""Ends of modules with LoRA on several of their parameters (`target_parameters`)."""
_UNREAD_PARTS = ("lora_", "vera_", "hada_", "trainable_tokens", "token_adapter")
"""Parts of names that only tensors of adapters have."""


def match_part(name: str) -> re.Match[str] | None:
    """Return the match of a tensor that is a factor or a magnitude, None for all others."""
    stripped = strip_prefix(name)
    for pattern in (_FACTOR, EMBEDDING_FACTOR, _MAGNITUDE):
        match = pattern.match(stripped)
        if match:
            return match
    return None


def insert_adapter(name: str, adapter: str) -> str:
    """Return the name of a part with its adapter's name, as PEFT writes several in one file."""
    for pattern in (_FACTOR, EMBEDDING_FACTOR, _MAGNITUDE, TOKEN_ROWS):
        match = pattern.match(name)
        if match is None:
            continue
        suffix = ".weight" if pattern is _FACTOR else ""
        stem = name.removesuffix(".weight") if pattern is not TOKEN_ROWS else name
        if match["adapter"]:
            stem = stem.removesuffix(f".{match['adapter']}")
        return f"{stem}.{adapter}{suffix}"
    return f"{adapter}.{name}"


def strip_prefix(name: str) -> str:
    """Return a name without the prefix of PEFT."""
    return name.removeprefix("base_model.model.")


def match_token_rows(name: str) -> re.Match[str] | None:
    """Return the match of a tensor that holds trained token rows, None for all others."""
    return TOKEN_ROWS.match(strip_prefix(name))


def whole_name(name: str) -> str | None:
    """Return the name of a tensor that is saved whole, without what PEFT puts into it.

    None for parts of adapters.
    """
    if match_part(name) is not None or match_token_rows(name):
        return None
    return _WRAPPERS.sub("", strip_prefix(name))


def is_unread(name: str) -> bool:
    """Return whether the name of a tensor saved whole is that of an adapter of unknown kind."""
    plain = whole_name(name)
    return plain is not None and any(part in plain for part in _UNREAD_PARTS)
