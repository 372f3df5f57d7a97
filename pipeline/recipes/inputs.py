"""What a recipe reads beside whole checkpoints: adapters, slices of layers, rows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is: a checkpoint, and the LoRA adapter that is merged into it."""

    uri: str
    adapter: str | None = None

    def list_uris(self) -> tuple[str, ...]:
        """Return the URIs that it is read from."""
        return (self.uri,) if self.adapter is None else (self.uri, self.adapter)


@dataclass(frozen=True)
class LayerSlice:
    """Successive layers of one model; `first` and `last` are both included."""

    place: ModelPlace
    first: int
    last: int


@dataclass(frozen=True)
class TokenOwner:
    """A model named where a recipe speaks of tokens.

    `value` is an expert's name or a URI, empty for the other kinds.
    """

    kind: Literal["base", "expert", "checkpoint", "union", "zero"]
    value: str = ""

    def to_text(self) -> str:
        """Return what a recipe says for it."""
        return self.value or self.kind


@dataclass(frozen=True)
class TokenRow:
    """Where the row of one token comes from. Without `token` and `token_id`: of the same token."""

    owner: TokenOwner
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    def to_keys(self) -> dict[str, object]:
        """Return it as a recipe says it."""
        source: object = self.owner.to_text()
        if self.token is not None:
            source = {"model": source, "token": self.token}
        elif self.token_id is not None:
            source = {"model": source, "token_id": self.token_id}
        return {"source": source, "force": self.force}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of the merged model, and the rows of single tokens."""

    source: TokenOwner
    rows: tuple[tuple[str, TokenRow], ...] = ()
    pad_to_multiple_of: int = 1
    fill_from: TokenOwner | None = None
    """Whose rows models take for tokens that they lack; None: the base's."""

    def map_uris(self, change: Callable[[str], str]) -> Vocabulary:
        """Return the vocabulary with every URI changed."""

        def move(owner: TokenOwner) -> TokenOwner:
            if owner.kind != "checkpoint":
                return owner
            return replace(owner, value=change(owner.value))

        rows = tuple((token, replace(row, owner=move(row.owner))) for token, row in self.rows)
        fill_from = None if self.fill_from is None else move(self.fill_from)
        return replace(self, source=move(self.source), rows=rows, fill_from=fill_from)

    def to_keys(self) -> dict[str, object]:
        """Return it as a recipe says it."""
        keys: dict[str, object] = {"source": self.source.to_text()}
        if self.rows:
            keys["tokens"] = {token: row.to_keys() for token, row in self.rows}
        if self.pad_to_multiple_of > 1:
            keys["pad_to_multiple_of"] = self.pad_to_multiple_of
        if self.fill_from is not None:
            keys["fill_from"] = self.fill_from.to_text()
        return keys

    def describe(self) -> dict[str, object]:
        """Return it as a manifest says it: without paths."""
        tokens = {token: row.owner.kind for token, row in self.rows}
        described: dict[str, object] = {"source": self.source.kind}
        if self.source.kind == "expert":
            described["source"] = self.source.value
        if tokens:
            described["tokens"] = tokens
        if self.pad_to_multiple_of > 1:
            described["pad_to_multiple_of"] = self.pad_to_multiple_of
        return described


def map_place(place: ModelPlace, change: Callable[[str], str]) -> ModelPlace:
    """Return a place with its URIs changed."""
    adapter = None if place.adapter is None else change(place.adapter)
    return ModelPlace(change(place.uri), adapter)


def map_slices(
    slices: tuple[LayerSlice, ...], change: Callable[[str], str]
) -> tuple[LayerSlice, ...]:
    """Return slices with the URIs of their places changed."""
    return tuple(replace(part, place=map_place(part.place, change)) for part in slices)


def describe_slices(slices: tuple[LayerSlice, ...]) -> list[dict[str, object]]:
    """Return slices as a recipe says them, each with its place."""
    described: list[dict[str, object]] = []
    for part in slices:
        keys: dict[str, object] = {"layers": [part.first, part.last], "path": part.place.uri}
        if part.place.adapter is not None:
            keys["lora"] = part.place.adapter
        described.append(keys)
    return described
