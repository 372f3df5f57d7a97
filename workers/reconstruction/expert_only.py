"""Refusals for tensors that one expert's language model has and the base lacks."""

from __future__ import annotations

from mmerge.manifests.errors import ManifestError
from mmerge.workers.checkpoints.expert_only import describe_names, find_expert_only
from mmerge.workers.reconstruction.build_reader import BuildReader


def find_unshared(reader: BuildReader, expert: str) -> list[str]:
    """Return the names of an expert's language-model tensors that the base lacks, head included."""
    manifest = reader.manifest
    return find_expert_only(
        reader.names("carried", expert),
        base_names=(manifest.rename(name, expert=expert) for name in reader.base_names()),
        renames=manifest.to_expert(expert).renames,
    )


def refuse_unshared(reader: BuildReader, expert: str | None) -> None:
    """Raise ManifestError where a model would lack tensors that an expert was tuned with.

    Args:
        reader: the build.
        expert: whose weights a composite is made of; None for those of text tokens, which mix all
            experts. A head of its own is loaded with its expert; everything else is not.
    """
    if reader.manifest.kind != "masks":
        return
    for name in [expert] if expert else reader.expert_names:
        unshared = find_unshared(reader, name)
        if expert:
            head = reader.expert_name(reader.family.head, expert=expert)
            unshared = [tensor for tensor in unshared if tensor != head]
        if unshared:
            raise ManifestError(
                f"{reader.uri}: the language model of expert {name!r} has"
                f" {describe_names(unshared)}, the base has no such tensors, so this model would"
                f" run without them. Use that expert alone: mmerge export --expert {name}"
            )
