"""The keys of a mergekit YAML about tokens: tokenizer_source, tokenizer and chat_template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.mergekit_document import MergekitDocument
from mmerge.pipeline.recipes.mergekit_models import parse_model, refuse, to_mapping

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_KINDS = ("model_token", "zero")


def translate_tokenizer(document: MergekitDocument) -> dict[str, Any] | None:
    """Return the recipe's `tokenizer` for a mergekit YAML, None where it gives none.

    Raises:
        RecipeError: a key is unknown or has a value that mergekit does not have.
    """
    raw = document.raw
    if raw.get("tokenizer_source") is not None and raw.get("tokenizer") is not None:
        refuse("tokenizer_source", "is given beside 'tokenizer', which mergekit refuses too")
    if raw.get("tokenizer_source") is not None:
        source = raw["tokenizer_source"]
        return {"source": _translate_source(document, source, "tokenizer_source")}
    if raw.get("tokenizer") is None:
        return None
    if isinstance(raw["tokenizer"], str):
        return {"source": _translate_source(document, raw["tokenizer"], "tokenizer")}
    keys = to_mapping(raw["tokenizer"], "tokenizer")
    for key in keys:
        if key not in _KEYS:
            refuse(f"tokenizer.{key}", f"is unknown. Known are {', '.join(_KEYS)}")
    # mergekit's default.
    source = keys.get("source", "union")
    recipe: dict[str, Any] = {"source": _translate_source(document, source, "tokenizer.source")}
    tokens = to_mapping(keys.get("tokens"), "tokenizer.tokens")
    if tokens:
        recipe["tokens"] = {
            str(token): _translate_token(document, value, f"tokenizer.tokens.{token}")
            for token, value in tokens.items()
        }
    if keys.get("pad_to_multiple_of") is not None:
        recipe["pad_to_multiple_of"] = keys["pad_to_multiple_of"]
    return recipe


def _translate_source(document: MergekitDocument, value: Any, where: str) -> str:
    if value in ("base", "union"):
        return str(value)
    return _translate_model(document, value, where)


def _translate_model(document: MergekitDocument, value: Any, where: str) -> str:
    if isinstance(value, dict) and "model" not in value:
        value = {"model": value}
    model = parse_model(value, where, folder=document.folder)
    if model.adapter is not None:
        refuse(where, f"{str(model)!r}: give a model without an adapter, which has its tokenizer")
    if document.is_base(model):
        return "base"
    return document.to_path(model.path)


def _translate_token(document: MergekitDocument, value: Any, where: str) -> dict[str, Any]:
    keys = to_mapping(value, where)
    for key in keys:
        if key not in ("source", "force"):
            refuse(f"{where}.{key}", "is unknown. Known are source, force")
    token: dict[str, Any] = {}
    if keys.get("source") is None:
        refuse(f"{where}.source", "is missing. Name the model whose row the token has")
    token["source"] = _translate_row(document, keys["source"], f"{where}.source")
    if keys.get("force"):
        token["force"] = keys["force"]
    return token


def _translate_row(document: MergekitDocument, value: Any, where: str) -> str | Mapping[str, Any]:
    if not isinstance(value, dict) or "kind" not in value:
        return _translate_model(document, value, where)
    kind = value["kind"]
    if kind == "zero":
        return "zero"
    if kind != "model_token":
        refuse(f"{where}.kind", f"{kind!r} is unknown. Known are {', '.join(_KINDS)}")
    row: dict[str, Any] = {}
    row["model"] = _translate_model(document, value.get("model"), f"{where}.model")
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
