"""Runs and builds as tables: what `mmerge run`, `show`, `log`, `diff` and `export` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.format.references import Reference
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.pipeline.monitoring.printable import escape
from mmerge.pipeline.monitoring.progress import to_size
from mmerge.pipeline.views.build_summary import (
    BuildSummary,
    ConsensusSummary,
    select_layer,
    summarise_masks,
)
from mmerge.pipeline.views.compare import Difference, LayerChange, LogEntry
from mmerge.pipeline.views.tables import make_table

if TYPE_CHECKING:
    from mmerge.pipeline.build.run import RunReport
    from mmerge.workers.exports.lora import AdapterReport

_CONSENSUS_NAMES = {0: "no mask (catastrophic)", 1: "one mask (selfish)"}


def print_run(report: RunReport, console: Console) -> None:
    """Print what a run did."""
    build = report.build[:SHOWN_DIGITS]
    reference = f"{report.reference.name}@{report.reference.number}"
    if report.repaired and not report.is_new:
        console.print(
            f"[green]repaired[/] build {build} ({reference}): {len(report.repaired)} objects were"
            " missing or damaged, and were written again:"
        )
        for key in report.repaired:
            console.print(f"  {escape(key)}", highlight=False)
        return
    if report.is_compared:
        console.print(
            f"[green]equal[/]: build {build} ({reference}) was computed again, with the same bytes"
            f" as in the store. Read {to_size(report.bytes_read)}"
        )
        return
    if not report.is_new:
        state = "now refers to it" if report.moved else "already refers to it"
        console.print(
            f"[green]nothing to do[/]: build {build} of the same inputs and parameters is in the"
            f" store; {reference} {state}"
        )
        return
    phases = []
    for phase, num_computed in report.num_computed.items():
        num_reused = report.num_reused.get(phase)
        reused = f" (+{num_reused} in the store)" if num_reused else ""
        phases.append(f"{phase} {num_computed}{reused}")
    console.print(
        f"[green]built[/] {build} as {reference}. Shards: {', '.join(phases)}. Read"
        f" {to_size(report.bytes_read)}"
    )
    console.print(f"  {escape(report.uri)}")


def print_adapter(report: AdapterReport, console: Console) -> None:
    """Print how much of the merge an exported adapter holds."""
    console.print(
        f"wrote an adapter of rank {report.rank} for {report.num_matrices} matrices to"
        f" {escape(report.folder)}"
    )
    console.print(f"  it lacks {report.residual:.2%} of the norm of their task vectors")
    if report.left_out:
        console.print(
            "  merged tensors that an adapter cannot hold:"
            f" {escape(', '.join(report.left_out))}. Build with 'merge: linear' to leave them as"
            " in the base"
        )


def print_references(references: Sequence[Reference], console: Console, *, store_uri: str) -> None:
    """Print the composites of a store."""
    console.print(f"{escape(store_uri)} holds {len(references)} composites:")
    table = make_table("composite", "number", "build", "created")
    for reference in references:
        table.add_data(
            f"#{reference.name}",
            str(reference.number),
            reference.build[:SHOWN_DIGITS],
            reference.created,
        )
    console.print(table)


def print_build(summary: BuildSummary, console: Console, *, layers: bool) -> None:
    """Print a build: its inputs, its masks, how the experts overlap; with `layers` per layer."""
    manifest = summary.manifest
    parameters = ", ".join(f"{name} {value}" for name, value in manifest.parameters.items())
    console.print(
        f"[bold]build {manifest.build[:SHOWN_DIGITS]}[/]: {escape(manifest.method)}"
        f" ({escape(parameters)}), kind {manifest.kind}, {escape(manifest.dtype)}"
    )
    console.print(
        f"  {len(manifest.entries)} objects, {to_size(summary.num_bytes)}; base"
        f" {manifest.base.revision[:SHOWN_DIGITS]}\n"
    )
    table = make_table("expert", "modality", "revision", numbers=("mask density", "sign agreement"))
    masks = {mask.expert: mask for mask in summary.masks}
    for expert in manifest.experts:
        mask = masks.get(expert.name)
        shares = (f"{mask.density:.1%}", f"{mask.sign_agreement:.1%}") if mask else ("-", "-")
        table.add_data(expert.name, expert.modality, expert.revision[:SHOWN_DIGITS], *shares)
    console.print(table)
    for line in manifest.warnings.lines if manifest.warnings else ():
        console.print(f"[yellow]warning[/]: {escape(line)}", highlight=False)
    if summary.consensus:
        _print_consensus(summary.consensus, console)
    if layers and summary.masks:
        _print_layers(summary, console)


def _print_consensus(consensus: ConsensusSummary, console: Console) -> None:
    shares = [
        f"{_CONSENSUS_NAMES.get(count, f'{count} masks')} {share:.1%}"
        for count, share in enumerate(consensus.shares)
    ]
    console.print(f"\nweights kept by {escape(', '.join(shares))}")
    if consensus.overlaps:
        pairs = [f"{pair} {share:.1%}" for pair, share in consensus.overlaps.items()]
        console.print(f"kept by both of {escape(', '.join(pairs))}")


def _print_layers(summary: BuildSummary, console: Console) -> None:
    layers = {layer_of(row.name) for row in summary.rows} - {None}
    names = [expert.name for expert in summary.manifest.experts]
    table = make_table("layer", *names, title="mask density (sign agreement)")
    for layer in sorted(layer for layer in layers if layer is not None):
        masks = summarise_masks(summary.manifest, select_layer(summary.rows, layer))
        cells = [f"{mask.density:.1%} ({mask.sign_agreement:.1%})" for mask in masks]
        table.add_data(str(layer), *cells)
    console.print()
    console.print(table)


def print_log(entries: Sequence[LogEntry], console: Console) -> None:
    """Print the builds of a name, newest first."""
    table = make_table("composite", "build", "created", "from", "mmerge")
    for entry in entries:
        reference = entry.reference
        sources = [f"{owner} {revision}" for owner, revision in reference.sources.items()]
        table.add_data(
            f"{reference.name}@{reference.number}",
            reference.build[:SHOWN_DIGITS] + ("" if entry.is_stored else " (deleted)"),
            reference.created,
            ", ".join(sources),
            reference.versions.get("mmerge", "?"),
        )
    console.print(table)


def print_difference(difference: Difference, console: Console) -> None:
    """Print what changed from one build to another."""
    before, after = difference.before.build, difference.after.build
    if difference.is_empty:
        console.print(f"both are build {before[:SHOWN_DIGITS]}")
        return
    console.print(f"build [bold]{before[:SHOWN_DIGITS]}[/] → [bold]{after[:SHOWN_DIGITS]}[/]")
    for name, old, new in difference.inputs:
        console.print(
            f"  input      {escape(name)}: {_shorten(old)} → {_shorten(new)}", highlight=False
        )
    for name, old, new in difference.parameters:
        console.print(f"  parameter  {escape(name)}: {old} → {new}", highlight=False)
    console.print(
        f"  objects    {difference.num_shared} shared ({to_size(difference.shared_bytes)}),"
        f" {difference.num_new} new ({to_size(difference.new_bytes)})"
    )
    if difference.layers:
        _print_changed_layers(difference.layers, console)


def _print_changed_layers(layers: Sequence[LayerChange], console: Console) -> None:
    experts = list(dict.fromkeys(name for layer in layers for name in layer.densities))
    table = make_table("layer", "tensors changed", "‖τ⋆‖", *(f"{name} mask" for name in experts))
    for layer in layers:
        norms = ["-" if norm is None else f"{norm:.4g}" for norm in layer.norms]
        cells = []
        for name in experts:
            densities = layer.densities.get(name)
            cells.append(f"{densities[0]:.2%} → {densities[1]:.2%}" if densities else "-")
        table.add_data(
            "outside layers" if layer.layer is None else str(layer.layer),
            str(layer.num_tensors),
            " → ".join(norms),
            *cells,
        )
    console.print(table)


def _shorten(revision: Any) -> str:
    return "none" if revision is None else str(revision)[:SHOWN_DIGITS]
