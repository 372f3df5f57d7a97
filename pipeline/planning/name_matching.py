"""Which tensor of an expert is which of the base: by prefix, or as transformers names them.

Decided from headers and configurations alone. The result is stored as pairs of prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline.planning.relayout import (
    RelaidCheckpoint,
    find_other_layouts,
    read_region,
    to_shape,
)
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.families.fused_parameters import ParameterLayout
from mmerge.workers.families.name_map import (
    HEAD_WEIGHT,
    NameMap,
    UnknownClass,
    is_language_name,
    map_names,
    parameter_of,
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
    relaid: Checkpoint | None = None
    """The expert in the base's layout, where its files have another; None where they have it."""


def _rename_by(name: str, targets: Mapping[str, str]) -> str:
    """Return the name that the longest matching prefix in `targets` gives."""
    if name in targets:
        return targets[name]
    stop = len(name)
    while stop >= 0:
        stop = name.rfind(".", 0, stop)
        prefix = name[: stop + 1]
        if prefix in targets:
            return targets[prefix] + name[stop + 1 :]
    return name


def make_renamer(renames: Renames) -> Callable[[str], str]:
    """Return a function that gives the name of a tensor of the base in an expert's files.

    Looks up the prefixes of a name instead of trying all pairs: a layout of 46,000 tensors may need
    as many pairs.
    """
    targets = dict(renames)

    return lambda name: _rename_by(name, targets)


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
    renamer = make_renamer(renames)
    for name, source in base.tensors.items():
        theirs = expert.tensors.get(renamer(name))
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
    renamer = make_renamer(renames)
    unmatched = {name for name in base.tensors if renamer(name) not in expert.tensors}
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
    layouts = find_other_layouts(base, expert, base_map=base_map, expert_map=expert_map)
    language_names = [canonical for canonical in ours if is_language_name(canonical)]
    num_matched = sum(
        canonical in theirs or parameter_of(canonical) in layouts for canonical in language_names
    )
    _check_share(base, expert, num_matched=num_matched, total=len(language_names))
    pairs = {
        name: theirs[canonical]
        for canonical, name in ours.items()
        if canonical in theirs and parameter_of(canonical) not in layouts
    }
    relaid = _relay(base, expert, pairs, layouts)
    unmatched = frozenset(set(base.tensors) - set(pairs))
    if HEAD_WEIGHT in theirs and HEAD_WEIGHT not in ours:
        # Readers of the build learn from it what the expert's own head is called.
        pairs[base.family.head] = theirs[HEAD_WEIGHT]
    renames = make_renames(pairs, prefix=base.language_prefix)
    return NameMatch(renames, unmatched, relaid=relaid if relaid is not expert else None)


def _map_names(checkpoint: Checkpoint) -> NameMap:
    try:
        return map_names(checkpoint.config, checkpoint.tensors)
    except UnknownClass as error:
        raise UnknownClass(
            f"{checkpoint.owner}: {checkpoint.uri}: {Exception.__str__(error)}"
        ) from error


def _relay(
    base: Checkpoint,
    expert: Checkpoint,
    pairs: dict[str, str],
    layouts: Mapping[str, tuple[ParameterLayout, ParameterLayout]],
) -> Checkpoint:
    """Return the expert with the parameters of other layouts in the base's, and add their names.

    The formed tensors are called as the expert's files call the base's tensors around them.
    """
    if not layouts:
        return expert
    consumed = {name for _, layout in layouts.values() for name in layout.regions}
    tensors = {name: source for name, source in expert.tensors.items() if name not in consumed}
    renamer = make_renamer(make_renames(pairs, prefix=base.language_prefix))
    for base_layout, expert_layout in layouts.values():
        for name, region in base_layout.regions.items():
            expert_name = renamer(name)
            if expert_name in tensors:
                raise CheckpointError(
                    f"{expert.owner}: {expert.uri} holds {expert_name}, and parts of it in other"
                    " tensors. Save it with save_pretrained of its class"
                )
            source = read_region(region, expert_layout, expert, name=expert_name)
            tensors[expert_name] = to_shape(source, base.tensors[name].spec.shape)
            pairs[name] = expert_name
    return RelaidCheckpoint(expert, tensors)


def make_renames(pairs: Mapping[str, str], *, prefix: str) -> Renames:
    """Return the fewest prefixes found that rename as `pairs` do; exact for every name in it.

    Takes time linear in the number of names.

    Args:
        pairs: name in the expert's files by name in the base.
        prefix: of the language model in the base, which gets a pair of its own.
    """
    renames: dict[str, str] = {}
    targets = Counter(
        pairs[name].removesuffix(name[len(prefix) :])
        for name in pairs
        if name.startswith(prefix) and pairs[name].endswith(name[len(prefix) :])
    )
    if targets:
        renames[prefix] = targets.most_common(1)[0][0]
    uniform = _find_uniform_prefixes(pairs)
    for name in sorted(pairs):
        if _rename_by(name, renames) != pairs[name]:
            key = next(
                (item for item in _list_prefixes(name) if item in uniform and item not in renames),
                name,
            )
            renames[key] = uniform[key] if key != name else pairs[name]
    if any(_rename_by(name, renames) != target for name, target in pairs.items()):
        # A prefix that is right for most names is wrong for one: spell all out.
        return _sort_renames(pairs)
    return _sort_renames(renames)


def _find_uniform_prefixes(pairs: Mapping[str, str]) -> dict[str, str]:
    """Return the prefixes below which all names are renamed by one other prefix, with that one."""
    uniform: dict[str, str | None] = {}
    for name, target in pairs.items():
        for prefix in _list_prefixes(name):
            rest = name[len(prefix) :]
            new = target.removesuffix(rest) if target.endswith(f".{rest}") else None
            if uniform.setdefault(prefix, new) != new:
                uniform[prefix] = None
    return {prefix: new for prefix, new in uniform.items() if new is not None}


def _list_prefixes(name: str) -> list[str]:
    """Return the prefixes of a name that end with a dot, shortest first."""
    return [name[: index + 1] for index, letter in enumerate(name) if letter == "."]


def _sort_renames(renames: Mapping[str, str]) -> Renames:
    return tuple(sorted(renames.items(), key=lambda pair: (-len(pair[0]), pair)))
