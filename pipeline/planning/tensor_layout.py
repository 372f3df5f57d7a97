"""Which tensors of an expert's files are the base's language model, and which are carried. Headers
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.manifests.format.safetensors_header import FLOAT_DTYPES
from mmerge.workers.checkpoints.checkpoint import Checkpoint, TensorSource

EMBEDDING_SUFFIX = "embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_COMPARED_CONFIG_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "hidden_act",
)  # fmt: skip


@dataclass(frozen=True)
class SharedTensor:
    """One language-model tensor that base and every expert have, with equal shape up to extra
    vocabulary rows.
    """

    name: str
    base: TensorSource
    experts: tuple[TensorSource, ...]


@dataclass(frozen=True)
class CarriedTensor:
    """A tensor that is copied from one expert: its own, or the vocabulary rows from `row_start` on
    of a shared one.
    """

    name: str
    source: TensorSource
    row_start: int = 0

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
    """Tensors of the base that are not merged: the base's are used."""
    carried: tuple[tuple[CarriedTensor, ...], ...]
    """Per expert, its own tensors."""
    renames: tuple[tuple[tuple[str, str], ...], ...]
    """Per expert, (prefix in the base, prefix in the expert's files), longest first."""


def find_renames(base: Checkpoint, expert: Checkpoint) -> tuple[tuple[str, str], ...]:
    """Return how an expert's files name the base's tensors: pairs of prefixes, longest first.

    The language model is found by its embedding: of all tensors whose names end in
    `embed_tokens.weight`, the one whose prefix makes the most of the base's names exist. This holds
    for all layouts in which `transformers` saves models whose language model keeps its own names
    (docs/checkpoints.md lists them).

    Raises:
        CheckpointError: base or expert has no embedding of that name, or the expert has none of the
            base's layers.
    """
    base_prefix = _embedding_prefix(base.tensors, base)[0]
    body = [name for name in base.tensors if name.startswith(base_prefix) and name != HEAD_NAME]
    candidates = _embedding_prefix(expert.tensors, expert)
    counted = {
        prefix: sum(prefix + name[len(base_prefix) :] in expert.tensors for name in body)
        for prefix in candidates
    }
    prefix = max(candidates, key=lambda candidate: counted[candidate])
    if counted[prefix] < len(body) / 2:
        raise CheckpointError(
            f"{expert.owner}: only {counted[prefix]} of the base's {len(body)} tensors are in"
            f" {expert.uri} (under {prefix!r}): its language model is"
            f" {describe_architecture(expert)}, the base is {describe_architecture(base)}. Experts"
            " must be tuned from the base"
        )
    renames = {base_prefix: prefix}
    heads = [
        name
        for name in expert.tensors
        if name.endswith(HEAD_NAME)
        and (name == HEAD_NAME or prefix.startswith(name[: -len(HEAD_NAME)]))
    ]
    if heads:
        renames[HEAD_NAME] = max(heads, key=len)
    return tuple(sorted(renames.items(), key=lambda pair: (-len(pair[0]), pair)))


def _embedding_prefix(tensors: dict[str, TensorSource], checkpoint: Checkpoint) -> list[str]:
    found = [name[: -len(EMBEDDING_SUFFIX)] for name in tensors if name.endswith(EMBEDDING_SUFFIX)]
    if not found:
        raise CheckpointError(
            f"{checkpoint.owner}: {checkpoint.uri} has no tensor named *{EMBEDDING_SUFFIX}:"
            f" {describe_architecture(checkpoint)} is not supported. Language models must use the"
            " tensor names of LLaMA (LLaMA, Mistral, Qwen2, Qwen3, …)"
        )
    return found


def describe_architecture(checkpoint: Checkpoint) -> str:
    """Return the language model's type and sizes, for errors."""
    text = checkpoint.text_config
    sizes = ", ".join(
        f"{key} {text[key]}" for key in ("num_hidden_layers", "hidden_size") if key in text
    )
    return f"{text.get('model_type', 'of unknown type')!r}" + (f" ({sizes})" if sizes else "")


def rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """Return the name that a tensor of the base has in an expert's files."""
    for base_prefix, expert_prefix in renames:
        if name.startswith(base_prefix):
            return expert_prefix + name[len(base_prefix) :]
    return name


def make_layout(
    base: Checkpoint, experts: list[Checkpoint], *, merge: str, carry: tuple[str, ...]
) -> Layout:
    """Return how base and experts fit together; every misfit of every expert is reported at once.

    Raises:
        ShapeMismatch: a tensor's shape differs by more than extra vocabulary rows.
        CheckpointError: an expert lacks a tensor, or is of another architecture.
    """
    for expert in experts:
        _check_architecture(base, expert)
    renames = [find_renames(base, expert) for expert in experts]
    listed = {name for name in base.tensors if any(fnmatchcase(name, pattern) for pattern in carry)}
    for pattern in carry:
        if not any(fnmatchcase(name, pattern) for name in base.tensors):
            raise CheckpointError(
                f"carry: {pattern!r} fits no tensor of the base, so it has no effect. Take it out,"
                " or mend the pattern"
            )
    _check_shapes(base, experts, renames, listed)
    kept_names = {
        name
        for name in base.tensors
        if name not in listed and not is_merged(base.tensors[name], merge)
    }
    merged = [name for name in base.tensors if name not in listed and name not in kept_names]
    shared = tuple(
        SharedTensor(
            name,
            base.tensors[name],
            tuple(e.tensors[rename(name, r)] for e, r in zip(experts, renames, strict=True)),
        )
        for name in merged
    )
    carried = tuple(
        tuple(_list_carried(base, expert, names, listed))
        for expert, names in zip(experts, renames, strict=True)
    )
    return Layout(
        shared,
        tuple(base.tensors[name] for name in sorted(kept_names | listed)),
        carried,
        tuple(renames),
    )


def is_merged(source: TensorSource, merge: str) -> bool:
    """Return whether a tensor of the base is merged under `merge: all` or `merge: linear`."""
    if source.spec.dtype not in FLOAT_DTYPES:
        return False
    if merge == "all":
        return True
    return len(source.spec.shape) == 2 and source.spec.name.split(".")[-2:][0] in LINEAR_NAMES


def _list_carried(
    base: Checkpoint, expert: Checkpoint, renames: tuple[tuple[str, str], ...], listed: set[str]
) -> list[CarriedTensor]:
    in_expert = {rename(name, renames): name for name in base.tensors}
    carried = []
    for file_name, source in expert.tensors.items():
        name = in_expert.get(file_name)
        if name is None or name in listed:
            carried.append(CarriedTensor(file_name, source))
            continue
        rows, base_rows = _num_rows(source), _num_rows(base.tensors[name])
        if rows > base_rows:
            carried.append(CarriedTensor(name, source.to_rows(base_rows, rows), base_rows))
    return carried


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
    renames: list[tuple[tuple[str, str], ...]],
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
                    if name == HEAD_NAME and expert.is_tied()
                    else ""
                )
                missing.append(
                    f"{name}: {expert.owner} has no {rename(name, names)}{tied}, the base has"
                    f" {source.spec.shape}"
                )
            elif not _fits(source.spec.shape, theirs.spec.shape, name):
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
            + ". Extra vocabulary rows are carried automatically; any other difference must be"
            " listed under 'carry'"
        )
    if missing:
        raise CheckpointError(
            _first_of(missing)
            + ". Was the expert tuned from this base? A tensor that is not to be merged can be"
            " listed under 'carry'"
        )


def _fits(base: tuple[int, ...], expert: tuple[int, ...], name: str) -> bool:
    if base == expert:
        return True
    is_vocabulary = name.endswith(EMBEDDING_SUFFIX) or name == HEAD_NAME
    return (
        is_vocabulary
        and len(base) == len(expert)
        and base[1:] == expert[1:]
        and expert[0] > base[0]
    )


def _first_of(failures: list[str]) -> str:
    shown = failures[:3]
    more = f"\n  … and {len(failures) - len(shown)} more" if len(failures) > len(shown) else ""
    return "\n  ".join(shown) + more
