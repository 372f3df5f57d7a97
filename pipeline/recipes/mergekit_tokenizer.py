"""The keys of a mergekit YAML about tokens: tokenizer_source, tokenizer and chat_template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.mergekit_document import MergekitDocument
from mmerge.pipeline.recipes.mergekit_models import parse_model, refuse, to_mapping

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_KINDS = ("model_token", "zero")


def translate_tokenizer(document: MergekitDocument, *, has_base: bool) -> dict[str, Any] | None:
    """Return the recipe's `tokenizer` for a mergekit YAML, None where it gives none.

    Args:
        document: the YAML.
        has_base: whether base_model is the base of the recipe, and not one of its experts.

    Raises:
        RecipeError: a key is unknown or has a value that mergekit does not have.
    """
    raw = document.raw
    if raw.get("tokenizer_source") is not None and raw.get("tokenizer") is not None:
        refuse("tokenizer_source", "is given beside 'tokenizer', which mergekit refuses too")
    where, keys = "tokenizer", raw.get("tokenizer")
    if raw.get("tokenizer_source") is not None:
        where, keys = "tokenizer_source", raw["tokenizer_source"]
    if keys is None:
        return None
    if isinstance(keys, str):
        keys = {"source": keys}
    return _TokenizerTranslator(document, has_base).translate(to_mapping(keys, where), where)


@dataclass(frozen=True)
class _TokenizerTranslator:
    document: MergekitDocument
    has_base: bool

    def translate(self, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
        for key in keys:
            if key not in _KEYS:
                refuse(f"{where}.{key}", f"is unknown. Known are {', '.join(_KEYS)}")
        # mergekit's default.
        source = keys.get("source", "union")
        recipe: dict[str, Any] = {"source": self.translate_source(source, f"{where}.source")}
        tokens = to_mapping(keys.get("tokens"), f"{where}.tokens")
        if tokens:
            recipe["tokens"] = {
                str(token): self.translate_token(value, f"{where}.tokens.{token}")
                for token, value in tokens.items()
            }
        if keys.get("pad_to_multiple_of") is not None:
            recipe["pad_to_multiple_of"] = keys["pad_to_multiple_of"]
        if self.document.base is not None and not self.has_base:
            recipe["fill_from"] = self.translate_base()
        return recipe

    def translate_base(self) -> str:
        """Return base_model as the recipe names it; the first model in a YAML without one."""
        base = self.document.base
        if base is None or self.has_base:
            return "base"
        return self.document.to_path(base.path)

    def translate_source(self, value: Any, where: str) -> str:
        if value == "union":
            return "union"
        return self.translate_base() if value == "base" else self.translate_model(value, where)

    def translate_model(self, value: Any, where: str) -> str:
        if isinstance(value, dict) and "model" not in value:
            value = {"model": value}
        model = parse_model(value, where, folder=self.document.folder)
        if model.adapter is not None:
            refuse(where, f"{str(model)!r}: give a model without an adapter, which has its tokens")
        if self.document.is_base(model):
            return self.translate_base()
        return self.document.to_path(model.path)

    def translate_token(self, value: Any, where: str) -> dict[str, Any]:
        keys = to_mapping(value, where)
        for key in keys:
            if key not in ("source", "force"):
                refuse(f"{where}.{key}", "is unknown. Known are source, force")
        if keys.get("source") is None:
            refuse(f"{where}.source", "is missing. Name the model whose row the token has")
        token: dict[str, Any] = {"source": self.translate_row(keys["source"], f"{where}.source")}
        if keys.get("force"):
            token["force"] = keys["force"]
        return token

    def translate_row(self, value: Any, where: str) -> str | Mapping[str, Any]:
        if not isinstance(value, dict) or "kind" not in value:
            return self.translate_model(value, where)
        kind = value["kind"]
        if kind == "zero":
            return "zero"
        if kind != "model_token":
            refuse(f"{where}.kind", f"{kind!r} is unknown. Known are {', '.join(_KINDS)}")
        row: dict[str, Any] = {"model": self.translate_model(value.get("model"), f"{where}.model")}
        chosen = [key for key in ("token", "token_id") if value.get(key) is not None]
        if len(chosen) != 1:
            raise RecipeError(f"{where}: give either 'token' or 'token_id'")
        row[chosen[0]] = value[chosen[0]]
        return row


def translate_template(document: MergekitDocument) -> str | None:
    """Return the recipe's `chat_template` for a mergekit YAML, None where it gives none."""
    template = document.raw.get("chat_template")
    if template is None:
        return None
    if not isinstance(template, str):
        raise RecipeError(f"chat_template: expected text, got {template!r}")
    return template
