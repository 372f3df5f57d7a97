"""Tokens and chat template of a checkpoint, read from its files without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmerge.manifests import limits
from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.checkpoint import Checkpoint

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_ADDED_FILE = "added_tokens.json"
_VOCABULARY_FILE = "vocab.json"
TEMPLATE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    _CONFIG_FILE,
    "processor_config.json",
)
"""Files that may hold the chat template, in the order in which transformers looks for it."""
FILES = (TOKENIZER_FILE, _CONFIG_FILE, _ADDED_FILE, _VOCABULARY_FILE)
"""Files that say which id a token has. The vocabulary of sentencepiece's `tokenizer.model` is not
read."""


def read_vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return the ids of all tokens by token, added ones included; None without a vocabulary.

    `tokenizer.json` is read, else `vocab.json` with the added tokens beside it.

    Raises:
        CheckpointError: a file is too large, no JSON, or holds something else than tokens and ids.
    """
    raw = _read_object(checkpoint, TOKENIZER_FILE)
    where = f"{checkpoint.owner}: {checkpoint.uri}/{TOKENIZER_FILE}"
    try:
        if raw is not None:
            added = {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
            return _check_ids(_to_ids(raw["model"].get("vocab")) | added)
        where = f"{checkpoint.owner}: {checkpoint.uri}/{_VOCABULARY_FILE}"
        vocabulary = _read_object(checkpoint, _VOCABULARY_FILE)
        if vocabulary is None:
            return None
        decoder = (_read_object(checkpoint, _CONFIG_FILE) or {}).get("added_tokens_decoder") or {}
        added = {token["content"]: int(number) for number, token in decoder.items()}
        return _check_ids(
            _to_ids(vocabulary) | (_read_object(checkpoint, _ADDED_FILE) or {}) | added
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: is no vocabulary of tokens and ids. Fetch the tokenizer again"
        ) from error


def read_chat_template(checkpoint: Checkpoint) -> Any:
    """Return the chat template, or the list of named ones; None if the checkpoint has none.

    Raises:
        CheckpointError: a file is too large, or no JSON.
    """
    return parse_chat_template(
        checkpoint.read_small_file, where=f"{checkpoint.owner}: {checkpoint.uri}"
    )


def parse_chat_template(read: Callable[[str], bytes | None], *, where: str) -> Any:
    """Return the chat template of a checkpoint, as `read_chat_template`.

    Args:
        read: returns the content of a file by its name, None if there is none.
        where: names the checkpoint in errors.
    """
    for name in TEMPLATE_FILES:
        data = read(name)
        if data is None:
            continue
        if name.endswith(".jinja"):
            return data.decode(errors="replace")
        template = _parse_object(data, where=f"{where}/{name}").get("chat_template")
        if template:
            return template
    return None


def _to_ids(vocabulary: Any) -> dict[str, Any]:
    """Return tokens with their ids, of either form: by token, or a list of (token, score)."""
    if isinstance(vocabulary, list):
        return {entry[0]: number for number, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _check_ids(ids: Mapping[Any, Any]) -> dict[str, int]:
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or number < 0:
            raise TypeError
    return dict(ids)


def _read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    data = checkpoint.read_small_file(name)
    if data is None:
        return None
    return _parse_object(data, where=f"{checkpoint.owner}: {checkpoint.uri}/{name}")


def _parse_object(data: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = parse_json(
            data, what=where, max_bytes=limits.SMALL_FILE_BYTES.value, allow_infinity=True
        )
    except ValueError as error:
        raise CheckpointError(f"{error}. Fetch the tokenizer again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is no JSON object. Fetch the tokenizer again")
    return value
