"""Rows of embeddings and heads by token: which rows of which tables a merged vocabulary takes.

Tokens keep their ids of the chosen tokenizer. A model that has a token gives its own row. One that
lacks it takes the row that the recipe names, else the base's, else the mean of those that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, FLOAT_DTYPES
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.pipeline.recipes.inputs import TokenRow
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.formed_sources import GatheredSource, RowRun
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.checkpoints.tokenizer import read_vocabulary

Terms = tuple[tuple[int, int], ...]
"""(Model, row) pairs whose mean is a row; none for a row of zeros."""


@dataclass(frozen=True)
class TokenizedModel:
    """A checkpoint with its tokens."""

    checkpoint: Checkpoint

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Ids by token. Raises CheckpointError."""
        ids = read_vocabulary(self.checkpoint)
        if not ids:
            raise CheckpointError(
                f"{self.checkpoint.owner}: {self.checkpoint.uri} has no tokenizer.json (nor"
                " vocab.json), so its rows cannot be matched by token. Save its tokenizer in the"
                " fast format (AutoTokenizer, save_pretrained), or leave 'tokenizer' out"
            )
        return ids

    @cached_property
    def num_rows(self) -> int:
        """Rows of its embedding."""
        return self.embedding.spec.shape[0]

    @cached_property
    def embedding(self) -> TensorSource:
        """The table of its embedding. Raises CheckpointError."""
        checkpoint = self.checkpoint
        name = f"{checkpoint.language_prefix}{checkpoint.family.embedding}"
        return checkpoint.tensors[name]

    def row_of(self, token: str) -> int | None:
        """Return the row of a token, None if the tokenizer lacks it.

        Raises:
            CheckpointError: the tokenizer has it, and the embedding has no such row.
        """
        row = self.ids.get(token)
        return row if row is None else self.check_row(row, token)

    def check_row(self, row: int, token: str) -> int:
        """Return a row that the embedding has. Raises CheckpointError."""
        if row >= self.num_rows:
            raise CheckpointError(
                f"{self.checkpoint.owner}: {self.checkpoint.uri}: token {token!r} has id {row:,},"
                f" and the embedding has {self.num_rows:,} rows. Give a model whose tokenizer fits"
                " its embedding (resize_token_embeddings, save_pretrained)"
            )
        return row


@dataclass(frozen=True)
class MergedVocabulary:
    """The tokens of the merged model, and where their rows come from."""

    ids: Mapping[str, int]
    num_rows: int
    models: tuple[TokenizedModel, ...]
    """The merged models, then others that only give rows."""
    num_merged: int
    fills: int | None
    """Position of the model whose rows others take, the base; None in a merge without base."""
    rows: Mapping[str, tuple[TokenRow, int | None]]
    """By token, what the recipe says, and the position of the model that it names."""

    @cached_property
    def tokens(self) -> tuple[str | None, ...]:
        """The token of every row; None for a row that no token has."""
        tokens: list[str | None] = [None] * self.num_rows
        for token, number in self.ids.items():
            tokens[number] = token
        return tuple(tokens)

    @cached_property
    def defaults(self) -> tuple[Terms | None, ...]:
        """By row, the terms for a model that lacks the token."""
        return tuple(None if token is None else self._find_default(token) for token in self.tokens)

    def terms_of(self, model: int) -> Iterator[Terms]:
        """Yield the terms of every row of one model."""
        for token, default in zip(self.tokens, self.defaults, strict=True):
            if token is None or default is None:
                yield ()
                continue
            is_forced = token in self.rows and self.rows[token][0].force
            row = None if is_forced else self.models[model].row_of(token)
            yield default if row is None else ((model, row),)

    def _find_default(self, token: str) -> Terms:
        if token in self.rows:
            return self._find_given_row(token)
        if self.fills is not None:
            row = self.models[self.fills].row_of(token)
            if row is not None:
                return ((self.fills, row),)
        terms = []
        for position, model in enumerate(self.models[: self.num_merged]):
            row = model.row_of(token)
            if row is not None:
                terms.append((position, row))
        if not terms:
            raise CheckpointError(
                f"tokenizer: no merged model has a row for the token {token!r}. Name its row under"
                " 'tokenizer.tokens'"
            )
        return tuple(terms)

    def _find_given_row(self, token: str) -> Terms:
        row, position = self.rows[token]
        if position is None:
            return ()
        model = self.models[position]
        if row.token_id is not None:
            return ((position, model.check_row(row.token_id, token)),)
        source_token = row.token or token
        number = model.row_of(source_token)
        if number is None:
            raise CheckpointError(
                f"tokenizer.tokens.{token}: {model.checkpoint.uri} has no token {source_token!r}"
            )
        return ((position, number),)


def gather_tables(vocabulary: MergedVocabulary, model: int) -> dict[str, TensorSource]:
    """Return embedding and head of one model for the merged vocabulary, by their names.

    Raises:
        CheckpointError: another tensor has a row per token, or a model lacks a table that others
            would take rows from.
    """
    checkpoint = vocabulary.models[model].checkpoint
    runs = tuple(_make_runs(vocabulary.terms_of(model)))
    gathered = {}
    for name, source in checkpoint.tensors.items():
        role = _table_role(name, checkpoint)
        if role is None:
            _check_no_table(name, source, vocabulary.models[model])
            continue
        gathered[name] = _gather(vocabulary, model, runs, source, role=role)
    return gathered


def _table_role(name: str, checkpoint: Checkpoint) -> str | None:
    """Return `embedding`, `head` or `bias` of tensors with a row per token, else None."""
    family = checkpoint.family
    if name == f"{checkpoint.language_prefix}{family.embedding}":
        return "embedding"
    if family.is_head(name):
        return "head"
    module, _, kind = name.rpartition(".")
    return "bias" if kind == "bias" and family.is_head(f"{module}.weight") else None


def _check_no_table(name: str, source: TensorSource, model: TokenizedModel) -> None:
    checkpoint = model.checkpoint
    is_outside = layer_of(name) is None and name.startswith(checkpoint.language_prefix)
    shape = source.spec.shape
    if is_outside and len(shape) == 2 and shape[0] == model.num_rows:
        raise CheckpointError(
            f"{checkpoint.owner}: {name} has a row per token as well, and is not matched by token."
            " Leave 'tokenizer' out where all models have the same tokens"
        )


def _gather(
    vocabulary: MergedVocabulary,
    model: int,
    runs: tuple[RowRun, ...],
    source: TensorSource,
    *,
    role: str,
) -> TensorSource:
    if len(runs) == 1 and runs[0].terms == ((model, 0),):
        num_rows = runs[0].num_rows
        return source if num_rows == source.spec.shape[0] else source.to_rows(0, num_rows)
    used = sorted({position for run in runs for position, _ in run.terms})
    tables = []
    for position in used:
        table = source if position == model else _find_table(vocabulary.models[position], role)
        if table.spec.shape[1:] != source.spec.shape[1:]:
            raise CheckpointError(
                f"tokenizer: rows of {table.uri} have the shape {table.spec.shape[1:]}, those of"
                f" {source.uri} {source.spec.shape[1:]}. Take rows from models of one size"
            )
        tables.append(table)
    numbers = {position: number for number, position in enumerate(used)}
    renumbered = tuple(
        RowRun(run.num_rows, tuple((numbers[position], row) for position, row in run.terms))
        for run in runs
    )
    dtypes = {table.spec.dtype for table in tables}
    has_means = any(len(run.terms) > 1 for run in runs)
    dtype = "F32" if has_means or len(dtypes) != 1 else dtypes.pop()
    shape = (vocabulary.num_rows, *source.spec.shape[1:])
    spec = replace(source.spec, dtype=dtype, shape=shape, offset=0, num_bytes=0)
    spec = replace(spec, num_bytes=spec.num_entries * DTYPE_BYTES[dtype])
    first = tables[0] if tables else source
    return GatheredSource(first.uri, first.file, spec, tables=tuple(tables), runs=renumbered)


def _find_table(model: TokenizedModel, role: str) -> TensorSource:
    """Return the table of another model that has this role; a tied head is the embedding."""
    checkpoint = model.checkpoint
    for name, source in checkpoint.tensors.items():
        if _table_role(name, checkpoint) == role and source.spec.dtype in FLOAT_DTYPES:
            return source
    if role == "head":
        return model.embedding
    raise CheckpointError(
        f"tokenizer: rows of {checkpoint.uri} are needed, and it has no {role} of the head"
    )


def _make_runs(terms_by_row: Iterator[Terms]) -> Iterator[RowRun]:
    """Yield as few runs as the rows allow."""
    first: Terms | None = None
    length = 0
    for terms in terms_by_row:
        continued = first is not None and terms == tuple(
            (position, row + length) for position, row in first
        )
        if continued:
            length += 1
            continue
        if first is not None:
            yield RowRun(length, first)
        first, length = terms, 1
    if first is not None:
        yield RowRun(length, first)


def number_tokens(
    models: Sequence[TokenizedModel], source: TokenizedModel | None, extra: Sequence[str]
) -> dict[str, int]:
    """Return the ids of the merged vocabulary.

    Args:
        models: the merged models, the base (or the first one) first.
        source: the model whose tokenizer is taken; None for the union of all.
        extra: tokens that the recipe adds to a union.

    Raises:
        CheckpointError: the chosen tokenizer lacks one of the extra tokens.
    """
    if source is not None:
        for token in extra:
            if token not in source.ids:
                raise CheckpointError(
                    f"tokenizer.tokens.{token}: the tokenizer of {source.checkpoint.uri} has no"
                    f" such token. Use 'source: union' to add it"
                )
        return dict(source.ids)
    ids = dict(models[0].ids)
    next_id = max(ids.values()) + 1
    added: list[str] = []
    for model in models[1:]:
        added += sorted(model.ids, key=lambda token: model.ids[token])
    for token in (*added, *extra):
        if token not in ids:
            ids[token] = next_id
            next_id += 1
    return ids
