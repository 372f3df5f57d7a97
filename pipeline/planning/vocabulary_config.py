"""Sizes and token ids that configurations state, for a vocabulary with other ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline.planning.tokenizer_files import Files, parse_object
from mmerge.pipeline.planning.vocabulary_rows import TokenizedModel
from mmerge.workers.families.registry import text_config_of

GENERATION_FILE = "generation_config.json"
_ID_ENDINGS = ("_token_id", "_token_index", "_token_ids")


@dataclass(frozen=True)
class TokenIds:
    """The ids of the merged vocabulary, and the model whose tokenizer they are of."""

    ids: Mapping[str, int]
    source: TokenizedModel | None
    """None for the union of all tokenizers, which begins with the first model's."""

    @cached_property
    def source_config(self) -> Mapping[str, Any]:
        """The ids that the source's configuration states."""
        return {} if self.source is None else self.source.checkpoint.config


def change_vocabulary(
    model: TokenizedModel, token_ids: TokenIds, *, num_rows: int
) -> tuple[dict[str, Any], Files]:
    """Return a model's configuration for the merged vocabulary, and its files that state ids.

    Raises:
        CheckpointError: an id stands for a token that the merged vocabulary lacks.
    """
    config = model.checkpoint.config
    stated_rows = text_config_of(config).get("vocab_size")
    ids = _IdMap(model, token_ids)
    changed = _change_part(config, ids, stated_rows=stated_rows, num_rows=num_rows)
    data = model.checkpoint.read_small_file(GENERATION_FILE)
    if data is None:
        return changed, {}
    generation = parse_object(model.checkpoint, GENERATION_FILE, data)
    new = _change_part(generation, ids, stated_rows=None, num_rows=num_rows)
    if new == generation:
        return changed, {}
    return changed, {GENERATION_FILE: json.dumps(new, indent=2, sort_keys=True).encode() + b"\n"}


def _change_part(
    part: Mapping[str, Any], ids: _IdMap, *, stated_rows: Any, num_rows: int
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in part.items():
        if isinstance(value, dict):
            changed[key] = _change_part(value, ids, stated_rows=stated_rows, num_rows=num_rows)
        elif key == "vocab_size" and value == stated_rows and value is not None:
            changed[key] = num_rows
        elif key.endswith(_ID_ENDINGS):
            changed[key] = ids.change(key, value)
        else:
            changed[key] = value
    return changed


class _IdMap:
    """Ids of one model's tokenizer to those of the merged vocabulary."""

    def __init__(self, model: TokenizedModel, token_ids: TokenIds) -> None:
        self._model, self._token_ids = model, token_ids
        self._tokens = {number: token for token, number in model.ids.items()}

    def change(self, key: str, value: Any) -> Any:
        """Return the ids of a key, or of the tokenizer's own model where they have no token."""
        if isinstance(value, list):
            return [self.change(key, item) for item in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        token = self._tokens.get(value)
        number = None if token is None else self._token_ids.ids.get(token)
        if number is not None:
            return number
        stated = self._token_ids.source_config.get(key)
        if isinstance(stated, int) and not isinstance(stated, bool):
            return stated
        if token is None:
            # An id without a token (a class's default) is never met in text.
            return value
        raise CheckpointError(
            f"{self._model.checkpoint.owner}: {self._model.checkpoint.uri}: its configuration"
            f" states {key} {value}, the token {token!r}, which the tokenizer of the merged model"
            " lacks. Use 'source: union'"
        )
