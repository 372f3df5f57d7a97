"""Checks that keep a plan from leaving out, without a word, what an expert's files say."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.safetensors_header import FLOAT_DTYPES
from mmerge.pipeline.planning.name_matching import make_renamer
from mmerge.pipeline.planning.tensor_layout import Layout
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.expert_only import describe_names, find_expert_only
from mmerge.workers.checkpoints.reading import has_equal_bytes
from mmerge.workers.checkpoints.sources import OpenStores
from mmerge.workers.methods.interface import Kind

Renames = Sequence[tuple[str, str]]


def check_unmerged_tensors(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    renames: Sequence[tuple[tuple[str, str], ...]],
    exempt: Collection[str],
) -> None:
    """Raise CheckpointError where a shared tensor that no method merges differs in an expert.

    Integers (token tables, positions, packed weights) and float64 have no task vectors, so the
    build holds the base's. That is right only where the expert has the same bytes. Such tensors
    are small, so they are read and compared here.

    Args:
        base: the base.
        experts: all experts.
        renames: per expert, how its files name the base's tensors.
        exempt: names of the base's tensors that each expert keeps (`carry`).
    """
    stores = OpenStores()
    renamers = [make_renamer(pairs) for pairs in renames]
    for name, source in base.tensors.items():
        if source.spec.dtype in FLOAT_DTYPES or name in exempt:
            continue
        for expert, renamer in zip(experts, renamers, strict=True):
            theirs = expert.tensors.get(renamer(name))
            if theirs is None or has_equal_bytes(source, theirs, stores=stores):
                continue
            raise CheckpointError(
                f"{name}: {expert.owner} has other values ({theirs.spec.dtype}) than the base"
                f" ({source.spec.dtype}), and tensors of {source.spec.dtype} cannot be merged."
                f" List it under 'carry' to keep each expert's own"
            )


def check_expert_only_tensors(
    base: Checkpoint, experts: Sequence[Checkpoint], layout: Layout, *, kind: Kind
) -> None:
    """Raise CheckpointError where a plain merge would leave out parts of an expert's decoder.

    Builds with masks keep such tensors with their expert, whose export has them; loading refuses
    what it cannot place.
    """
    if kind != "plain":
        return
    for expert, copied, pairs in zip(experts, layout.copied, layout.renames, strict=True):
        names = find_expert_only(
            (tensor.name for tensor in copied if not tensor.is_extra_rows),
            base_names=map(make_renamer(pairs), base.tensors),
            renames=pairs,
        )
        if names:
            raise CheckpointError(
                f"{expert.owner}: its language model has {describe_names(names)}, the base has no"
                " such tensors, and a merged checkpoint has no place for them. Use a method with"
                " masks (mmer), which keeps them with their expert, or give a base that has them"
            )
