"""Tensor layout: which tensors of an expert are the base's language model, which are copied.

Decided from headers and configurations alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.manifests.format.safetensors_header import FLOAT_DTYPES
from mmerge.pipeline.planning.config_checks import check_sizes
from mmerge.pipeline.planning.name_matching import (
    NameMatch,
    Renames,
    describe_architecture,
    has_fitting_shape,
    make_renamer,
    match_expert,
)
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.interface import Family

_MAX_SHOWN = 3
"""Misfits that an error lists; the others are counted."""


@dataclass(frozen=True)
class SharedTensor:
    """A language-model tensor of base and experts, of equal shape up to extra vocabulary rows."""

    name: str
    base: TensorSource
    experts: tuple[TensorSource, ...]


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor copied from one expert: its own, or the vocabulary rows it added to a shared one."""

    name: str
    source: TensorSource
    row_start: int = 0
    """First row of the shared tensor that `source` holds; 0 for a tensor of the expert alone."""

    @property
    def is_extra_rows(self) -> bool:
        """Whether these are the rows that the expert added to a shared tensor."""
        return self.row_start > 0


@dataclass(frozen=True)
class Layout:
    """How base and experts fit together."""

    shared: tuple[SharedTensor, ...]
    """Every tensor of the base that is merged."""
    kept: tuple[TensorSource, ...]
    """Tensors of the base that are not merged and taken from the base."""
    copied: tuple[tuple[CopiedTensor, ...], ...]
    """Per expert, the tensors copied from it."""
    renames: tuple[Renames, ...]
    """Per expert, how its files name the base's tensors."""
    experts: tuple[Checkpoint, ...]
    """The experts in the base's layout: formed ones where their files have another."""


def make_layout(
    base: Checkpoint,
    experts: list[Checkpoint],
    *,
    merge: str,
    carry: tuple[str, ...],
    keep: tuple[str, ...] = (),
) -> Layout:
    """Return how base and experts fit together; all misfits of all experts are reported at once.

    Args:
        base: the base model.
        experts: in recipe order.
        merge: `all`, or `linear` for the projections alone.
        carry: patterns of base tensors that are copied from each expert, not merged.
        keep: patterns of base tensors that stay the base's, whatever the experts have.

    Raises:
        ShapeMismatch: a tensor's shape differs by more than extra vocabulary rows.
        CheckpointError: an expert lacks a tensor or is of another architecture, or the projections
            of the base's family are unknown under `merge: linear`.
    """
    for expert in experts:
        check_sizes(base, expert)
    listed = match_names(base.tensors, carry)
    kept_names = match_names(base.tensors, keep)
    exempt = listed | kept_names
    matches = [match_expert(base, expert, exempt=exempt) for expert in experts]
    renames = [match.renames for match in matches]
    experts = [match.relaid or expert for match, expert in zip(matches, experts, strict=True)]
    renamers = [make_renamer(pairs) for pairs in renames]
    for key, patterns in (("carry", carry), ("keep", keep)):
        for pattern in patterns:
            if not match_names(base.tensors, [pattern]):
                raise CheckpointError(
                    f"{key}: {pattern!r} matches no tensor of the base, so it has no effect. Remove"
                    " it or correct the pattern"
                )
    for name in sorted(listed & kept_names):
        raise CheckpointError(
            f"keep: {name} is listed under 'carry' as well. It is the base's or each expert's"
        )
    _check_shapes(base, experts, matches, exempt)
    if merge == "linear":
        _check_projections(base)
    shared = []
    kept = []
    for name, source in base.tensors.items():
        if name in exempt or not is_merged(source, base.family, merge=merge):
            kept.append(source)
            continue
        sources = tuple(
            expert.tensors[renamer(name)] for expert, renamer in zip(experts, renamers, strict=True)
        )
        shared.append(SharedTensor(name, source, sources))
    copied = tuple(
        tuple(_list_copied(base, expert, names, listed))
        for expert, names in zip(experts, renames, strict=True)
    )
    return Layout(tuple(shared), tuple(kept), copied, tuple(renames), tuple(experts))


def match_names(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that fit one of the patterns of a recipe's `carry`."""
    chosen = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in chosen)}


def is_merged(source: TensorSource, family: Family, *, merge: str) -> bool:
    """Return whether a tensor of the base is merged under `merge: all` or `merge: linear`."""
    if source.spec.dtype not in FLOAT_DTYPES:
        return False
    return merge == "all" or family.is_projection(source.spec.name, source.spec.shape)


def _check_projections(base: Checkpoint) -> None:
    """Refuse `merge: linear` where it would skip matrices whose names no family knows."""
    shapes = {name: source.spec.shape for name, source in base.tensors.items()}
    unknown = base.family.unknown_projections(shapes)
    if unknown:
        raise CheckpointError(
            f"merge: 'linear' merges the Linear layers of known model families, and the base"
            f" ({describe_architecture(base)}) has matrices of unknown names:\n  "
            + _first_of(unknown)
            + ".\n Use 'merge: all', or add a model family (docs/add-a-family.md)"
        )


def _list_copied(
    base: Checkpoint, expert: Checkpoint, renames: Renames, listed: set[str]
) -> list[CopiedTensor]:
    renamer = make_renamer(renames)
    in_expert = {renamer(name): name for name in base.tensors}
    copied = []
    for file_name, source in expert.tensors.items():
        name = in_expert.get(file_name)
        if name is None or name in listed:
            copied.append(CopiedTensor(file_name, source))
            continue
        rows, base_rows = _num_rows(source), _num_rows(base.tensors[name])
        if rows > base_rows:
            copied.append(CopiedTensor(name, source.to_rows(base_rows, rows), base_rows))
    return copied


def _num_rows(source: TensorSource) -> int:
    return source.spec.shape[0] if source.spec.shape else 1


def _check_shapes(
    base: Checkpoint,
    experts: list[Checkpoint],
    matches: list[NameMatch],
    listed: set[str],
) -> None:
    missing: list[str] = []
    reasons: set[str] = set()
    different: list[str] = []
    for expert, match in zip(experts, matches, strict=True):
        renamer = make_renamer(match.renames)
        for name, source in base.tensors.items():
            theirs = expert.tensors.get(renamer(name))
            if name in listed:
                continue
            if theirs is None or name in match.unmatched:
                tied = (
                    " (its configuration ties it to the embedding, the base's does not)"
                    if base.family.is_head(name) and expert.is_tied()
                    else ""
                )
                counterpart = renamer(name)
                missing.append(
                    f"{name}: {expert.owner} has no {counterpart}{tied}, the base has"
                    f" {source.spec.shape}"
                )
                reasons |= {match.reason} - {""}
            elif not has_fitting_shape(
                source.spec.shape,
                theirs.spec.shape,
                is_vocabulary=base.family.is_vocabulary(name),
            ):
                different.append(
                    f"{name}: {expert.owner} has {theirs.spec.shape}, the base has"
                    f" {source.spec.shape}"
                )
            elif theirs.spec.dtype not in FLOAT_DTYPES and source.spec.dtype in FLOAT_DTYPES:
                different.append(
                    f"{name}: {expert.owner} has dtype {theirs.spec.dtype}, the base has"
                    f" {source.spec.dtype}"
                )
    if different:
        raise ShapeMismatch(
            _first_of(different)
            + ". Extra vocabulary rows are copied automatically; any other difference must be"
            " listed under 'carry'"
        )
    if missing:
        raise CheckpointError(
            _first_of(missing)
            + ". Was the expert tuned from this base? A tensor that is not to be merged can be"
            " listed under 'carry'"
            + "".join(f". Names were compared as they are stored: {reason}" for reason in reasons)
        )


def _first_of(failures: list[str]) -> str:
    shown = failures[:_MAX_SHOWN]
    more = f"\n  … and {len(failures) - len(shown)} more" if len(failures) > len(shown) else ""
    return "\n  ".join(shown) + more
