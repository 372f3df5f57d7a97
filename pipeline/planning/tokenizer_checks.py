"""Comparison of tokenizers and chat templates, which shapes of tensors do not show.

Rows of the embedding are merged by their number. Where one id means different tokens, the merged
row is a mixture that fits none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmerge.manifests.errors import CheckpointError, RecipeError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.tokenizer import FILES, read_chat_template, read_vocabulary

_SHOWN = 3
"""Ids that a warning lists; the others are counted."""
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one checkpoint by id; `problem` says why they could not be read."""

    owner: str
    by_id: dict[int, str]
    problem: str = ""


def list_tokenizer_warnings(base: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """Return what differs between the tokenizers and chat templates, one line each.

    Experts are compared with the base; with each other only in rows of the base's embedding that
    its tokenizer does not name, because rows beyond it are kept for each expert.
    """
    warnings = []
    base_tokens = _read_tokens(base)
    if base_tokens.problem:
        warnings.append(base_tokens.problem)
    earlier: list[_Tokens] = []
    num_rows = _num_rows(base)
    for expert in experts:
        if _has_equal_files(base, expert):
            tokens = _Tokens(expert.owner, base_tokens.by_id)
        else:
            tokens = _read_tokens(expert)
            warnings += _compare_tokens(base_tokens, tokens, num_rows=num_rows)
        unnamed = {
            number: token
            for number, token in tokens.by_id.items()
            if number < num_rows and number not in base_tokens.by_id
        }
        warnings += _compare_unnamed(unnamed, earlier, owner=expert.owner)
        earlier.append(_Tokens(expert.owner, unnamed))
        warnings += _compare_templates(base, expert)
    return warnings


def _has_equal_files(base: Checkpoint, expert: Checkpoint) -> bool:
    """Return whether the files are the same bytes, so that none has to be parsed."""
    return all(base.read_small_file(name) == expert.read_small_file(name) for name in FILES)


def _read_tokens(checkpoint: Checkpoint) -> _Tokens:
    try:
        vocabulary = read_vocabulary(checkpoint) or {}
    except CheckpointError as error:
        problem = f"{Exception.__str__(error)} Its tokens were not compared"
        return _Tokens(checkpoint.owner, {}, problem)
    return _Tokens(checkpoint.owner, {number: token for token, number in vocabulary.items()})


def _num_rows(base: Checkpoint) -> int:
    """Return the rows of the base's embedding."""
    shape = base.tensors[base.family.find_embedding(base.tensors) or ""].spec.shape
    return shape[0]


def _compare_tokens(base: _Tokens, expert: _Tokens, *, num_rows: int) -> list[str]:
    if expert.problem:
        return [expert.problem]
    differing = [
        (number, token, base.by_id[number])
        for number, token in sorted(expert.by_id.items())
        if number < num_rows and base.by_id.get(number, token) != token
    ]
    if not differing:
        return []
    shown = _list_ids(differing, "in the base")
    return [
        f"{expert.owner}: tokenizers differ, {shown}. Rows of the embedding are merged by id, and a"
        " merged model has the base's tokenizer"
    ]


def _compare_unnamed(
    unnamed: dict[int, str], earlier: Sequence[_Tokens], *, owner: str
) -> list[str]:
    warnings = []
    for tokens in earlier:
        differing = [
            (number, token, tokens.by_id[number])
            for number, token in sorted(unnamed.items())
            if tokens.by_id.get(number, token) != token
        ]
        if differing:
            shown = _list_ids(differing, f"in {tokens.owner}")
            warnings.append(
                f"{owner}: tokenizers differ, {shown}. The base has rows for these ids and no"
                " tokens, so rows of different tokens are merged"
            )
    return warnings


def _compare_templates(base: Checkpoint, expert: Checkpoint) -> list[str]:
    try:
        template = read_chat_template(expert)
        base_template = read_chat_template(base)
    except CheckpointError as error:
        return [f"{Exception.__str__(error)} Chat templates were not compared"]
    if template == base_template or template is None:
        return []
    what = "the base has none" if base_template is None else "the base has another"
    return [
        f"{expert.owner}: has a chat template, {what}. A merged model has the base's; a composite"
        " formats prompts of that expert's inputs by its own, unless the recipe has a 'template' or"
        " 'chat_template_from'"
    ]


def list_token_differences(base: Checkpoint, expert: Checkpoint) -> list[tuple[str, str, str]]:
    """Return (id, base's token, expert's token) of all ids that mean different tokens.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    ours, theirs = (_read_tokens(checkpoint) for checkpoint in (base, expert))
    for tokens in (ours, theirs):
        if tokens.problem:
            raise CheckpointError(tokens.problem)
    if not ours.by_id or not theirs.by_id:
        return []
    return [
        (f"id {number}", _show(ours.by_id[number]), _show(token))
        for number, token in sorted(theirs.by_id.items())
        if ours.by_id.get(number, token) != token
    ]


def check_chat_source(
    source: str | None, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> None:
    """Raise RecipeError where `chat_template_from` names a checkpoint without chat template.

    Args:
        source: its value.
        base: the base.
        experts: by name.
    """
    if source is None or source == "none":
        return
    checkpoint = base if source == "base" else experts[source]
    if read_chat_template(checkpoint) is None:
        raise RecipeError(
            f"chat_template_from: {checkpoint.owner} ({checkpoint.uri}) has no chat template. Name"
            " another, or leave the key out"
        )


def _list_ids(differing: Sequence[tuple[int, str, str]], where: str) -> str:
    parts = [
        f"id {number} is {_show(token)}, {where} {_show(counterpart)}"
        for number, token, counterpart in differing[:_SHOWN]
    ]
    if len(differing) > _SHOWN:
        parts.append(f"… and {len(differing) - _SHOWN} more ids")
    return "; ".join(parts)


def _show(token: str) -> str:
    shown = ascii(token) if not token.isprintable() else repr(token)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"
