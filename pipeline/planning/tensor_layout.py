"""Tensor layout: which tensors of an expert are the base's language model, which are copied.

Decided from headers and configurations alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.manifests.format.safetensors_header import FLOAT_DTYPES
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.families.interface import Family

_COMPARED_CONFIG_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
)
_MAX_SHOWN = 3
"""Misfits that an error lists; the others are counted."""

Renames = tuple[tuple[str, str], ...]
"""Pairs (prefix in the base, prefix in an expert's files), longest first."""


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


def find_renames(base: Checkpoint, expert: Checkpoint) -> Renames:
    """Return how an expert's files name the base's tensors: pairs of prefixes, longest first.

    The language model is found by its embedding, whose name the base's family knows: of all tensors
    called so, the one whose prefix makes the most of the base's names exist. This holds for all
    layouts in which `transformers` saves models whose language model keeps its own names
    (docs/checkpoints.md lists them).

    Raises:
        CheckpointError: the expert has no embedding of that name, or none of the base's layers.
    """
    family = base.family
    base_prefix = family.find_prefixes(base.tensors)[0]
    body = [name for name in base.tensors if name.startswith(base_prefix) and name != family.head]
    candidates = family.find_prefixes(expert.tensors)
    if not candidates:
        raise CheckpointError(
            f"{expert.owner}: {expert.uri} has no tensor named *{family.embedding}, which is the"
            f" embedding of the base ({describe_architecture(base)}); its own language model is"
            f" {describe_architecture(expert)}. Experts must be tuned from the base"
        )
    counts = {
        prefix: sum(prefix + name[len(base_prefix) :] in expert.tensors for name in body)
        for prefix in candidates
    }
    prefix = max(candidates, key=lambda candidate: counts[candidate])
    if counts[prefix] < len(body) / 2:
        raise CheckpointError(
            f"{expert.owner}: only {counts[prefix]} of the base's {len(body)} tensors are in"
            f" {expert.uri} (under {prefix!r}): its language model is"
            f" {describe_architecture(expert)}, the base is {describe_architecture(base)}. Experts"
            " must be tuned from the base"
        )
    renames = {base_prefix: prefix}
    heads = []
    for name in expert.tensors:
        is_of_model = name == family.head or prefix.startswith(name[: -len(family.head)])
        if family.is_head(name) and is_of_model:
            heads.append(name)
    if heads:
        renames[family.head] = max(heads, key=len)
    return tuple(sorted(renames.items(), key=lambda pair: (-len(pair[0]), pair)))


def describe_architecture(checkpoint: Checkpoint) -> str:
    """Return the language model's type and sizes, for errors."""
    text = checkpoint.text_config
    sizes = ", ".join(
        f"{key} {text[key]}" for key in ("num_hidden_layers", "hidden_size") if key in text
    )
    return f"{text.get('model_type', 'of unknown type')!r}" + (f" ({sizes})" if sizes else "")


def rename(name: str, renames: Renames) -> str:
    """Return the name that a tensor of the base has in an expert's files."""
    for base_prefix, expert_prefix in renames:
        if name.startswith(base_prefix):
            return expert_prefix + name[len(base_prefix) :]
    return name


def make_layout(
    base: Checkpoint, experts: list[Checkpoint], *, merge: str, carry: tuple[str, ...]
) -> Layout:
    """Return how base and experts fit together; all misfits of all experts are reported at once.

    Args:
        base: the base model.
        experts: in recipe order.
        merge: `all`, or `linear` for the projections alone.
        carry: patterns of base tensors that are copied from each expert, not merged.

    Raises:
        ShapeMismatch: a tensor's shape differs by more than extra vocabulary rows.
        CheckpointError: an expert lacks a tensor or is of another architecture, or the projections
            of the base's family are unknown under `merge: linear`.
    """
    for expert in experts:
        _check_architecture(base, expert)
    renames = [find_renames(base, expert) for expert in experts]
    listed = match_names(base.tensors, carry)
    for pattern in carry:
        if not any(fnmatchcase(name, pattern) for name in base.tensors):
            raise CheckpointError(
                f"carry: {pattern!r} matches no tensor of the base, so it has no effect. Remove it"
                " or correct the pattern"
            )
    _check_shapes(base, experts, renames, listed)
    if merge == "linear":
        _check_projections(base)
    shared = []
    kept = []
    for name, source in base.tensors.items():
        if name in listed or not is_merged(source, base.family, merge=merge):
            kept.append(source)
            continue
        sources = tuple(
            expert.tensors[rename(name, names)]
            for expert, names in zip(experts, renames, strict=True)
        )
        shared.append(SharedTensor(name, source, sources))
    copied = tuple(
        tuple(_list_copied(base, expert, names, listed))
        for expert, names in zip(experts, renames, strict=True)
    )
    return Layout(tuple(shared), tuple(kept), copied, tuple(renames))


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
    in_expert = {rename(name, renames): name for name in base.tensors}
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


def _check_architecture(base: Checkpoint, expert: Checkpoint) -> None:
    ours, theirs = base.text_config, expert.text_config
    if ours.get("model_type") != theirs.get("model_type"):
        raise CheckpointError(
            f"{expert.owner}: its language model is {describe_architecture(expert)}, the base is"
            f" {describe_architecture(base)}. Experts must be tuned from the base"
        )
    for key in _COMPARED_CONFIG_KEYS:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise CheckpointError(
                f"{expert.owner}: its language model has {key} {theirs[key]!r}, the base has"
                f" {ours[key]!r}. Experts must be tuned from the base"
            )


def _check_shapes(
    base: Checkpoint,
    experts: list[Checkpoint],
    renames: list[Renames],
    listed: set[str],
) -> None:
    missing: list[str] = []
    different: list[str] = []
    for expert, names in zip(experts, renames, strict=True):
        for name, source in base.tensors.items():
            theirs = expert.tensors.get(rename(name, names))
            if name in listed:
                continue
            if theirs is None:
                tied = (
                    " (its configuration ties it to the embedding, the base's does not)"
                    if base.family.is_head(name) and expert.is_tied()
                    else ""
                )
                missing.append(
                    f"{name}: {expert.owner} has no {rename(name, names)}{tied}, the base has"
                    f" {source.spec.shape}"
                )
            elif not _fits(source.spec.shape, theirs.spec.shape, base.family.is_vocabulary(name)):
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
        )


def _fits(base: tuple[int, ...], expert: tuple[int, ...], is_vocabulary: bool) -> bool:
    if base == expert:
        return True
    return (
        is_vocabulary
        and len(base) == len(expert)
        and base[1:] == expert[1:]
        and expert[0] > base[0]
    )


def _first_of(failures: list[str]) -> str:
    shown = failures[:_MAX_SHOWN]
    more = f"\n  … and {len(failures) - len(shown)} more" if len(failures) > len(shown) else ""
    return "\n  ".join(shown) + more
