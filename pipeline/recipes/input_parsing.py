"""Parsing of a recipe's inputs: adapters, slices of layers, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.inputs import (
    LayerSlice,
    ModelPlace,
    TokenOwner,
    TokenRow,
    Vocabulary,
)
from mmerge.pipeline.recipes.keys import SliceKeys, TokenizerKeys, TokenKeys, TokenRowKeys

RESERVED_OWNERS = ("base", "union", "zero")
"""What the keys of a tokenizer mean by these words, so that no expert may have them as name."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML format: roles and texts between <|im_start|> and <|im_end|>."""

ToAbsolute = Callable[[str, str], str]
"""Makes a URI absolute; the second argument is the key for errors."""


def parse_slices(
    slices: Sequence[SliceKeys] | None, place: ModelPlace, *, key: str, to_absolute: ToAbsolute
) -> tuple[LayerSlice, ...]:
    """Return the slices of one model. Raises RecipeError for layers that end before they begin."""
    parsed = []
    for index, part in enumerate(slices or ()):
        where = f"{key}.{index}"
        first, last = part.layers
        if first < 0 or last < first:
            raise RecipeError(
                f"{where}.layers: expected the first and the last layer, both included, got"
                f" {list(part.layers)}"
            )
        chosen = place
        if part.path is not None:
            chosen = ModelPlace(to_absolute(part.path, f"{where}.path"))
        if part.lora is not None:
            adapter = to_absolute(part.lora, f"{where}.lora")
            chosen = ModelPlace(chosen.uri, adapter)
        parsed.append(LayerSlice(chosen, first, last))
    return tuple(parsed)


def parse_vocabulary(
    keys: TokenizerKeys | None, expert_names: Collection[str], *, to_absolute: ToAbsolute
) -> Vocabulary | None:
    """Return the tokenizer that a recipe asks for, None if it says nothing.

    Raises:
        RecipeError: a source is ambiguous, or the row of a token is given in two ways.
    """
    if keys is None:
        return None
    for name in RESERVED_OWNERS:
        if name in expert_names:
            raise RecipeError(
                f"experts.{name}: the keys of 'tokenizer' mean something else by {name!r}. Give the"
                " expert another name"
            )

    def find_owner(text: str, key: str) -> TokenOwner:
        if text == "base":
            return TokenOwner("base")
        if text in expert_names:
            return TokenOwner("expert", text)
        return TokenOwner("checkpoint", to_absolute(text, key))

    source = (
        TokenOwner("union")
        if keys.source == "union"
        else find_owner(keys.source, "tokenizer.source")
    )
    rows = tuple(
        (token, _parse_row(row, f"tokenizer.tokens.{token}", find_owner))
        for token, row in keys.tokens.items()
    )
    fill_from = None
    if keys.fill_from is not None:
        fill_from = find_owner(keys.fill_from, "tokenizer.fill_from")
    return Vocabulary(source, rows, keys.pad_to_multiple_of or 1, fill_from)


def _parse_row(
    keys: TokenKeys, where: str, find_owner: Callable[[str, str], TokenOwner]
) -> TokenRow:
    source = keys.source
    if isinstance(source, TokenRowKeys):
        if (source.token is None) == (source.token_id is None):
            raise RecipeError(f"{where}.source: give either 'token' or 'token_id'")
        owner = find_owner(source.model, f"{where}.source.model")
        return TokenRow(owner, source.token, source.token_id, keys.force)
    if source == "zero":
        return TokenRow(TokenOwner("zero"), force=keys.force)
    return TokenRow(find_owner(source, f"{where}.source"), force=keys.force)


def parse_chat_template(text: str | None) -> str | None:
    """Return the Jinja text of a chat template, or `auto`.

    Raises:
        RecipeError: it is neither Jinja text nor a known name.
    """
    if text is None or text == "auto":
        return text
    if text == "chatml":
        return CHATML
    if "{{" not in text and "{%" not in text:
        raise RecipeError(
            f"chat_template: {text!r} is no name of a template that is known here (auto, chatml)"
            " and no Jinja text. Give the template's Jinja text"
        )
    return text
