"""Tokenizer files and chat template of a merged model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmerge.manifests.digest import parse_json
from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.tokenizer import TOKENIZER_FILE, read_chat_template

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json")
_SLOW_FILES = (
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Vocabularies in other formats, which lack the tokens that a union adds."""
FILES = (TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", *_SLOW_FILES, *_TEMPLATE_FILES)

Files = dict[str, bytes | None]
"""Small files by name; None where there is to be none."""


def copy_tokenizer(source: Checkpoint) -> Files:
    """Return the tokenizer files of a checkpoint, with those that it lacks."""
    names = [*FILES, *(name for name in source.read_small_files() if name.endswith(".tiktoken"))]
    return {name: source.read_small_file(name) for name in names}


def add_tokens(
    source: Checkpoint,
    tokens: Mapping[str, int],
    givers: Sequence[Checkpoint],
    *,
    new_tokens: Collection[str],
) -> Files:
    """Return the tokenizer files of a checkpoint with the tokens of others.

    Tokens of the others' vocabularies go into the vocabulary, so that text without them is split as
    before. Tokens that others added, and new ones, are added: they are matched in text as a whole.

    Args:
        source: whose tokenizer is extended.
        tokens: ids by token, those that it lacks.
        givers: the other models, whose tokenizers say how the tokens are matched in text.
        new_tokens: those that no model has.

    Raises:
        CheckpointError: the tokenizer is in no format that tokens can be added to.
    """
    files = copy_tokenizer(source)
    data = files[TOKENIZER_FILE]
    if not tokens:
        return files
    if data is None:
        raise CheckpointError(
            f"tokenizer: {source.uri} has no {TOKENIZER_FILE}, to which the tokens of other models"
            " are added. Save its tokenizer in the fast format (AutoTokenizer, save_pretrained)"
        )
    raw = parse_object(source, TOKENIZER_FILE, data)
    described = _describe_tokens(givers)
    added = list(raw.get("added_tokens") or ())
    vocabulary = raw["model"].get("vocab")
    for token, number in sorted(tokens.items(), key=lambda pair: pair[1]):
        is_added = token in described or token in new_tokens
        # Unigram numbers its vocabulary by position, where the added tokens follow.
        if isinstance(vocabulary, dict) and not is_added:
            vocabulary[token] = number
            continue
        added.append({**described.get(token, _PLAIN_TOKEN), "id": number, "content": token})
    raw["added_tokens"] = sorted(added, key=lambda item: int(item["id"]))
    files[TOKENIZER_FILE] = _to_json(raw)
    config = files[CONFIG_FILE]
    if config is not None:
        values = parse_object(source, CONFIG_FILE, config)
        if isinstance(values.get("added_tokens_decoder"), dict):
            decoder = values["added_tokens_decoder"]
            for item in added:
                flags = {key: value for key, value in item.items() if key != "id"}
                decoder.setdefault(str(item["id"]), flags)
            files[CONFIG_FILE] = _to_json(values)
    return files | dict.fromkeys(_SLOW_FILES)


_PLAIN_TOKEN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


def _describe_tokens(givers: Sequence[Checkpoint]) -> dict[str, dict[str, Any]]:
    """Return by token how it is matched, of tokens that some tokenizer adds to its vocabulary."""
    described: dict[str, dict[str, Any]] = {}
    for checkpoint in givers:
        data = checkpoint.read_small_file(TOKENIZER_FILE)
        if data is None:
            continue
        for item in parse_object(checkpoint, TOKENIZER_FILE, data).get("added_tokens") or ():
            described.setdefault(str(item["content"]), dict(item))
    return described


def set_chat_template(files: Files, template: Any, *, where: str) -> Files:
    """Return tokenizer files with a chat template in place of theirs.

    Raises:
        CheckpointError: the template is a list of named ones.
    """
    if not isinstance(template, str):
        raise CheckpointError(
            f"{where}: most models have the same list of named chat templates, and one is needed."
            " Give its Jinja text as 'chat_template'"
        )
    changed: Files = files | {TEMPLATE_FILE: template.encode(), "chat_template.json": None}
    config = files.get(CONFIG_FILE)
    if config is not None:
        values = parse_json(config, what=CONFIG_FILE, allow_infinity=True)
        if isinstance(values, dict) and "chat_template" in values:
            del values["chat_template"]
            changed[CONFIG_FILE] = _to_json(values)
    return changed


def find_common_template(checkpoints: Sequence[Checkpoint]) -> Any:
    """Return the chat template that most models have, of equally many the first; None of none."""
    templates = [read_chat_template(checkpoint) for checkpoint in checkpoints]
    texts = [json.dumps(template) for template in templates if template is not None]
    if not texts:
        return None
    counts = Counter(texts)
    most = max(counts.values())
    return json.loads(next(text for text in texts if counts[text] == most))


def parse_object(checkpoint: Checkpoint, name: str, data: bytes) -> dict[str, Any]:
    """Return the JSON object in a small file. Raises CheckpointError."""
    where = f"{checkpoint.owner}: {checkpoint.uri}/{name}"
    try:
        value = parse_json(data, what=where, max_bytes=len(data), allow_infinity=True)
    except ValueError as error:
        raise CheckpointError(f"{error}. Fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is no JSON object. Fetch the file again")
    return value


def _to_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
