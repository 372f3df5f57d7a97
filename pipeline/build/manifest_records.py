"""The records of base and experts in a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.format.manifest import BaseRecord, ExpertRecord, FileEntry
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.relayout import RelaidCheckpoint
from mmerge.workers.checkpoints.checkpoint import Checkpoint


def read_files(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[tuple[FileEntry, ...]], dict[str, bytes]]:
    """Return the small files of each checkpoint, in turn, and their contents by key."""
    listed: list[tuple[FileEntry, ...]] = []
    contents: dict[str, bytes] = {}
    for checkpoint in checkpoints:
        entries = []
        for name, data in checkpoint.read_small_files().items():
            entry = FileEntry(name=name, num_bytes=len(data), digest=digest_bytes(data))
            contents[entry.key] = data
            entries.append(entry)
        listed.append(tuple(entries))
    return listed, contents


def make_records(
    plan: MergePlan,
    digests: InputDigests,
    files: Sequence[tuple[FileEntry, ...]],
    rescalers: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the records of the recipe, the base and the experts.

    Args:
        plan: what is built.
        digests: of all inputs.
        files: from `read_files`.
        rescalers: per expert, where the method has them.
    """
    recipe = plan.recipe
    experts = tuple(
        ExpertRecord(
            name=expert.name,
            modality=expert.modality,
            revision=digests.revision(index + 1, expert.name, files[index + 1]),
            parameters=recipe.describe_parameters(expert.name),
            renames=plan.renames[index],
            source=_hub_source(expert.uri),
            placeholder=expert.placeholder,
            template=expert.template,
            rescaler=rescalers[index] if rescalers else None,
            adapters=plan.adapters[index] if plan.adapters else None,
            layout="base" if isinstance(plan.checkpoints[index + 1], RelaidCheckpoint) else None,
            files=files[index + 1],
        )
        for index, expert in enumerate(recipe.experts)
    )
    base_files = files[0]
    source = recipe.chat_template_from
    chosen = {} if source is None else {"chat_template_from": source}
    return chosen | {
        "kind": plan.kind,
        "method": recipe.method,
        "parameters": recipe.describe_parameters(),
        "merge": recipe.merge,
        "dtype": plan.dtype,
        "template": recipe.template,
        "base": BaseRecord(
            revision=digests.revision(0, "", base_files),
            source=_hub_source(recipe.base),
            files=base_files,
        ),
        "experts": experts,
    }


def describe_warnings(plan: MergePlan) -> list[str]:
    """Return a plan's warnings without the paths of its inputs, which are no part of a manifest."""
    lines = []
    for line in plan.warnings:
        # The longest first: one folder may lie within another one's.
        for uri in sorted({item.uri for item in plan.checkpoints}, key=len, reverse=True):
            line = line.replace(f"{uri}/", "").replace(uri, "its folder")
        lines.append(line)
    return lines


def _hub_source(uri: str) -> str | None:
    """Return the pinned URI of an input from the hub; other places are no part of a manifest."""
    return uri if uri.startswith("hf://") else None
