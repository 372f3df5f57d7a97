"""What `mmerge inspect` prints: one checkpoint, and how it differs from a base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from mmerge.pipeline.monitoring.printable import escape
from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.planning.inspection import Comparison, Inspection, MergeSummary
from mmerge.pipeline.views.tables import make_table

_SHOWN_RENAMES = 3


def inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    """Return all of an inspection; files by name, without their identities."""
    document = asdict(inspection)
    document["files"] = sorted(inspection.files)
    if inspection.comparison is not None:
        document["comparison"]["merges"] = not inspection.comparison.refusal
    return document


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what a checkpoint holds."""
    table = make_table("property", "value")
    for name, value in _list_properties(inspection):
        table.add_data(name, value)
    console.print(table)
    if inspection.groups:
        groups = make_table("outside the language model", numbers=("tensors", "bytes"))
        for group in inspection.groups:
            groups.add_data(group.prefix, f"{group.num_tensors:,}", to_size(group.num_bytes))
        console.print(groups)
    for problem in inspection.problems:
        console.print(f"[yellow]unknown[/]: {escape(problem)}", highlight=False)
    if inspection.comparison is not None:
        _print_comparison(inspection.comparison, console)


def _list_properties(inspection: Inspection) -> list[tuple[str, str]]:
    dtypes = [f"{dtype} {to_size(size)}" for dtype, size in inspection.dtypes.items()]
    rows = [
        ("path", inspection.uri),
        ("model type", inspection.model_type or "not stated"),
        ("class, or base of adapters", inspection.architecture or "not stated"),
        ("weight files", f"{len(inspection.files):,}"),
        ("tensors", f"{inspection.num_tensors:,}, {to_size(inspection.num_bytes)}"),
        ("dtypes", ", ".join(dtypes) or "unknown"),
        ("quantisation", inspection.quantization or "none"),
    ]
    for adapter in inspection.adapters:
        ranks = ", ".join(map(str, adapter.ranks))
        modules = ", ".join(adapter.modules)
        rows.append(
            (
                f"LoRA {adapter.name}",
                f"rank {ranks}, {adapter.num_modules:,} Linear layers: {modules}",
            )
        )
    if inspection.adapters:
        return rows
    tokens, vocabulary = inspection.tokenizer_tokens, inspection.vocabulary_rows
    prefix = inspection.language_prefix
    return [
        *rows,
        ("family", inspection.family or "unknown"),
        ("language model", "unknown" if prefix is None else f"{prefix}…"),
        ("vocabulary", "unknown" if vocabulary is None else f"{vocabulary:,} rows"),
        ("tokenizer", "not read" if tokens is None else f"{tokens:,} tokens"),
        ("head", "tied to the embedding" if inspection.is_tied else "its own"),
    ]


def _print_comparison(comparison: Comparison, console: Console) -> None:
    if comparison.refusal:
        console.print(f"[red]does not merge[/]: {escape(comparison.refusal)}", highlight=False)
    else:
        console.print(f"merges with {escape(comparison.base)}", highlight=False)
        if comparison.merge is not None:
            console.print(f"  {escape(_describe_merge(comparison.merge))}", highlight=False)
    if not comparison.differences:
        return
    table = make_table("difference", "of", "base", "checkpoint")
    for difference in comparison.differences:
        table.add_data(difference.kind, difference.subject, difference.base, difference.checkpoint)
    console.print(table)


def _describe_merge(merge: MergeSummary) -> str:
    """Return how a checkpoint merges: numbers of tensors, and what its files call them."""
    parts = [f"{merge.num_merged:,} tensors merged as {merge.dtype}"]
    if merge.num_kept:
        parts.append(f"{merge.num_kept:,} kept from the base")
    parts.append(f"{merge.num_copied:,} copied from the checkpoint")
    if merge.num_added_rows:
        parts.append(f"{merge.num_added_rows:,} vocabulary rows added")
    renames = [f"{base}… is {expert}…" for base, expert in merge.renames if base != expert]
    return "; ".join([", ".join(parts), *renames[:_SHOWN_RENAMES]])
