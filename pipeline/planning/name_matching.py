"""Which tensor of an expert is which of the base: by prefix, or as transformers names them.

Decided from headers and configurations alone. The result is stored as pairs of prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.families.name_map import (
    HEAD_WEIGHT,
    NameMap,
    UnknownClass,
    is_language_name,
    map_names,
)

Renames = tuple[tuple[str, str], ...]
"""Pairs (prefix in the base, prefix in an expert's files), longest first."""


@dataclass(frozen=True)
class NameMatch:
    """How an expert's files name the base's tensors."""

    renames: Renames
    unmatched: frozenset[str]
    """Names of the base's tensors that the expert lacks."""
    reason: str = ""
    """Why transformers could not be asked for the names; empty if it was, or was not needed."""


def rename(name: str, renames: Renames) -> str:
    """Return the name that a tensor of the base has in an expert's files."""
    for base_prefix, expert_prefix in renames:
        if name.startswith(base_prefix):
            return expert_prefix + name[len(base_prefix) :]
    return name


def match_expert(
    base: Checkpoint, expert: Checkpoint, *, exempt: Collection[str] = ()
) -> NameMatch:
    """Return how an expert's files name the base's tensors.

    Most checkpoints keep the base's names below another prefix, which the embedding tells. Where
    that does not place every tensor in its shape, the classes of both in transformers give the
    names. transformers is imported for these alone.

    Args:
        base: the base.
        expert: the expert.
        exempt: names of the base's tensors that need no counterpart (`carry`).

    Raises:
        CheckpointError: the expert's language model is another one, or has another layout.
    """
    candidates = _find_prefix_renames(base, expert)
    fitting = [pairs for pairs in candidates if _fits(base, expert, pairs, exempt=exempt)]
    if len(fitting) == 1:
        return NameMatch(fitting[0], frozenset())
    try:
        return _match_by_class(base, expert)
    except UnknownClass as error:
        if len(fitting) > 1:
            raise CheckpointError(
                f"{expert.owner}: {expert.uri} holds the base's tensors {len(fitting)} times, under"
                f" {', '.join(repr(pairs[-1][1]) for pairs in fitting)}, and which of them is its"
                f" language model is unknown: {error}"
            ) from error
        return _match_by_prefix(base, expert, candidates, reason=Exception.__str__(error))


def describe_architecture(checkpoint: Checkpoint) -> str:
    """Return the language model's type and sizes, for errors."""
    text = checkpoint.text_config
    sizes = ", ".join(
        f"{key} {text[key]}" for key in ("num_hidden_layers", "hidden_size") if key in text
    )
    return f"{text.get('model_type', 'of unknown type')!r}" + (f" ({sizes})" if sizes else "")


def _find_prefix_renames(base: Checkpoint, expert: Checkpoint) -> list[Renames]:
    """Return the renames of every prefix that may be the expert's language model.

    Those are the prefixes of all tensors called like the base's embedding, best first.
    """
    family = base.family
    base_prefix = base.language_prefix
    body = _body(base)
    counts = {
        prefix: sum(prefix + name[len(base_prefix) :] in expert.tensors for name in body)
        for prefix in family.find_prefixes(expert.tensors)
    }
    candidates = []
    for prefix in sorted(counts, key=lambda candidate: -counts[candidate]):
        renames = {base_prefix: prefix}
        heads = []
        for name in expert.tensors:
            is_of_model = name == family.head or prefix.startswith(name[: -len(family.head)])
            if family.is_head(name) and is_of_model:
                heads.append(name)
        if heads:
            renames[family.head] = max(heads, key=len)
        candidates.append(_sort_renames(renames))
    return candidates


def _body(base: Checkpoint) -> list[str]:
    """Return the names of the base's language model without its head."""
    prefix, head = base.language_prefix, base.family.head
    return [name for name in base.tensors if name.startswith(prefix) and name != head]


def _fits(
    base: Checkpoint, expert: Checkpoint, renames: Renames, *, exempt: Collection[str]
) -> bool:
    """Return whether renames place every tensor of the base in a fitting shape."""
    for name, source in base.tensors.items():
        theirs = expert.tensors.get(rename(name, renames))
        if name in exempt:
            continue
        is_vocabulary = base.family.is_vocabulary(name)
        if theirs is None or not has_fitting_shape(
            source.spec.shape, theirs.spec.shape, is_vocabulary=is_vocabulary
        ):
            return False
    return True


def has_fitting_shape(
    base: tuple[int, ...], expert: tuple[int, ...], *, is_vocabulary: bool
) -> bool:
    """Return whether a tensor has the base's shape, or more rows where those are a vocabulary's."""
    if base == expert:
        return True
    return (
        is_vocabulary
        and len(base) == len(expert)
        and base[1:] == expert[1:]
        and expert[0] > base[0]
    )


def _match_by_prefix(
    base: Checkpoint, expert: Checkpoint, candidates: list[Renames], *, reason: str
) -> NameMatch:
    """Return the renames that find most tensors: the last resort, without transformers."""
    renames = candidates[0] if candidates else ()
    unmatched = {name for name in base.tensors if rename(name, renames) not in expert.tensors}
    body = _body(base)
    num_matched = sum(name not in unmatched for name in body)
    _check_share(base, expert, num_matched=num_matched, total=len(body))
    return NameMatch(renames, frozenset(unmatched), reason)


def _check_share(base: Checkpoint, expert: Checkpoint, *, num_matched: int, total: int) -> None:
    """Raise CheckpointError where less than half of the base's language model is in the expert."""
    if num_matched >= total / 2:
        return
    if not base.family.find_prefixes(expert.tensors):
        raise CheckpointError(
            f"{expert.owner}: {expert.uri} has no tensor named *{base.family.embedding}, which is"
            f" the embedding of the base ({describe_architecture(base)}); its own language model is"
            f" {describe_architecture(expert)}. Experts must be tuned from the base"
        )
    raise CheckpointError(
        f"{expert.owner}: only {num_matched} of the base's {total} tensors are in"
        f" {expert.uri}: its language model is {describe_architecture(expert)}, the base is"
        f" {describe_architecture(base)}. Experts must be tuned from the base"
    )


def _match_by_class(base: Checkpoint, expert: Checkpoint) -> NameMatch:
    """Return the match of the names that both classes give in transformers."""
    base_map, expert_map = _map_names(base), _map_names(expert)
    ours, theirs = base_map.stored, expert_map.stored
    _check_layouts(expert, base_map, expert_map)
    language_names = [canonical for canonical in ours if is_language_name(canonical)]
    num_matched = sum(canonical in theirs for canonical in language_names)
    _check_share(base, expert, num_matched=num_matched, total=len(language_names))
    pairs = {name: theirs[canonical] for canonical, name in ours.items() if canonical in theirs}
    unmatched = frozenset(set(base.tensors) - set(pairs))
    if HEAD_WEIGHT in theirs and HEAD_WEIGHT not in ours:
        # Readers of the build learn from it what the expert's own head is called.
        pairs[base.family.head] = theirs[HEAD_WEIGHT]
    return NameMatch(make_renames(pairs, prefix=base.language_prefix), unmatched)


def _map_names(checkpoint: Checkpoint) -> NameMap:
    try:
        return map_names(checkpoint.config, checkpoint.tensors)
    except UnknownClass as error:
        raise UnknownClass(
            f"{checkpoint.owner}: {checkpoint.uri}: {Exception.__str__(error)}"
        ) from error


def _check_layouts(expert: Checkpoint, base_map: NameMap, expert_map: NameMap) -> None:
    """Raise CheckpointError where a parameter is fused in one checkpoint's files alone."""
    ours, theirs = base_map.by_parameter(), expert_map.by_parameter()
    for parameter in sorted(set(ours) & set(theirs)):
        if set(ours[parameter]) & set(theirs[parameter]):
            continue
        name = min(ours[parameter].values())
        expert_name = min(theirs[parameter].values())
        raise CheckpointError(
            f"{expert.owner}: {expert.uri} holds {expert_name} where the base holds {name}: both"
            f" are parts of one parameter in memory, in different layouts ({expert_map.class_name},"
            f" {base_map.class_name}). Merging needs one layout: save both with save_pretrained of"
            " one class"
        )


def make_renames(pairs: Mapping[str, str], *, prefix: str) -> Renames:
    """Return the fewest prefixes found that rename as `pairs` do; exact for every name in it.

    Args:
        pairs: name in the expert's files by name in the base.
        prefix: of the language model in the base, which gets a pair of its own.
    """
    renames: dict[str, str] = {}
    embeddings = [name for name in pairs if name.startswith(prefix)]
    targets = Counter(
        pairs[name].removesuffix(name[len(prefix) :])
        for name in embeddings
        if pairs[name].endswith(name[len(prefix) :])
    )
    if targets:
        renames[prefix] = targets.most_common(1)[0][0]
    for name in sorted(pairs):
        if rename(name, _sort_renames(renames)) != pairs[name]:
            key, value = _find_prefix_pair(name, pairs, renames)
            renames[key] = value
    result = _sort_renames(renames)
    if any(rename(name, result) != target for name, target in pairs.items()):
        # A prefix that is right for most names is wrong for one: spell all out.
        return _sort_renames(pairs)
    return result


def _find_prefix_pair(
    name: str, pairs: Mapping[str, str], renames: Mapping[str, str]
) -> tuple[str, str]:
    """Return the shortest prefix of a name that renames all names below it, else the whole name."""
    target = pairs[name]
    for stop in [index + 1 for index, letter in enumerate(name) if letter == "."]:
        prefix, rest = name[:stop], name[stop:]
        if prefix in renames or not target.endswith(f".{rest}"):
            continue
        new = target.removesuffix(rest)
        below = [other for other in pairs if other.startswith(prefix)]
        if all(pairs[other] == new + other[stop:] for other in below):
            return prefix, new
    return name, target


def _sort_renames(renames: Mapping[str, str]) -> Renames:
    return tuple(sorted(renames.items(), key=lambda pair: (-len(pair[0]), pair)))
