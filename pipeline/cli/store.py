"""The commands about stores: show, verify, export, diff, log, gc, copy, push, and what a plan finds
in the store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.options import JsonOption, UriArgument

if TYPE_CHECKING:
    from mmerge.pipeline.build.forecast import Forecast
    from mmerge.pipeline.views.compare import Difference

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str, *, option: str) -> timedelta:
    """Return the time that a text like 7d, 36h or 90m names. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if not match:
        raise RecipeError(f"{option}: expected a time like 7d, 36h or 90m, got {text!r}")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


@contextmanager
def byte_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show bytes and bytes per second on a terminal; elsewhere nothing. Yields what is to be told
    of every piece.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    if not err.is_terminal:
        yield lambda num_bytes: None
        return
    with Progress(
        TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=err
    ) as bars:
        task = bars.add_task(label, total=total)
        yield lambda num_bytes: bars.advance(task, num_bytes)


def show(
    uri: UriArgument,
    as_json: JsonOption = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="mask statistics per layer as well")
    ] = False,
) -> None:
    """Show a composite: what it was made from, its masks, and what the experts share. Or list the
    composites of a store.
    """
    from mmerge.manifests.format.references import list_references, split_uri
    from mmerge.manifests.stores.open import open_readable_store
    from mmerge.pipeline.views.report import print_build, print_references
    from mmerge.pipeline.views.show import read_build, read_references, to_json

    store_uri, fragment = split_uri(uri)
    if not fragment and not as_json:
        store = open_readable_store(store_uri)
        if len(list_references(store)) > 1:
            print_references(read_references(store), out, store_uri=store_uri)
            return
    summary = read_build(uri)
    if as_json:
        print(json.dumps(to_json(summary), indent=2))
    else:
        print_build(summary, out, layers=layers)


def verify(
    uri: UriArgument,
    sample: Annotated[
        float, typer.Option("--sample", help="share of the tensors to read; 1 reads everything")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="which tensors a sample takes; others each time", show_default=False
        ),
    ] = None,
) -> None:
    """Re-read a composite and compare every digest with its manifest. Exit code 1 if anything is
    damaged, with its name.
    """
    from mmerge.manifests.maintenance.verify import verify as verify_build
    from mmerge.pipeline.monitoring.progress import to_size

    with byte_bar("verify", None) as on_bytes:
        report = verify_build(uri, sample=sample, seed=seed, on_bytes=on_bytes)
    report.check()
    read = (
        "all digests equal"
        if sample == 1
        else f"a sample of {sample:.1%} of the tensors, its digests equal"
    )
    out.print(
        f"[green]verified[/] build {report.build[:12]}: {report.num_objects} objects,"
        f" {to_size(report.num_bytes)}, {read}"
    )


def export(
    uri: UriArgument,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="where to write it: a new or empty folder")
    ],
    expert: Annotated[
        str | None,
        typer.Option(
            "--expert",
            help="the expert to rebuild; without it, the language model for text alone",
            show_default=False,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            min=1,
            help="write a LoRA adapter (PEFT) of this rank instead of whole weights",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="with --lora-rank: the base's checkpoint, of a build that does not hold it",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an ordinary Hugging Face checkpoint that transformers loads with from_pretrained, or
    the merge as a LoRA adapter.
    """
    from mmerge.pipeline import export as export_checkpoint
    from mmerge.pipeline.monitoring.progress import to_size

    if lora_rank is not None:
        from mmerge.pipeline.views.report import print_adapter
        from mmerge.workers.exports.lora import export_adapter

        print_adapter(export_adapter(uri, to, rank=lora_rank, base=base, expert=expert), out)
        return
    if base is not None:
        raise RecipeError("--base has no effect without --lora-rank. Leave it out")
    report = export_checkpoint(uri, to, expert=expert)
    out.print(
        f"wrote {report.num_tensors} tensors, {to_size(report.num_bytes)}, to"
        f" {escape(report.folder)}: {', '.join(report.files)}"
    )


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="a composite: STORE#NAME@1")],
    other: Annotated[str, typer.Argument(metavar="B", help="another one: STORE#NAME@2")],
    as_json: JsonOption = False,
) -> None:
    """Show what changed from one build to another: inputs, numbers, objects, statistics per layer."""
    from mmerge.pipeline.views.compare import compare_builds, difference_to_json

    found = compare_builds(one, other)
    if as_json:
        print(json.dumps(difference_to_json(found), indent=2))
    else:
        _print_difference(found)


def _print_difference(found: Difference) -> None:
    from mmerge.pipeline.monitoring.progress import to_size

    if found.is_empty:
        out.print(f"both are build {found.one.build[:12]}")
        return
    out.print(f"build [bold]{found.one.build[:12]}[/] → [bold]{found.other.build[:12]}[/]")
    for name, before, after in found.inputs:
        out.print(f"  input   {escape(name)}: {_short(before)} → {_short(after)}", highlight=False)
    for name, before, after in found.numbers:
        out.print(f"  number  {escape(name)}: {before} → {after}", highlight=False)
    out.print(
        f"  objects {found.num_shared} shared ({to_size(found.shared_bytes)}), {found.num_new} new"
        f" ({to_size(found.new_bytes)})"
    )
    if not found.layers:
        return
    experts = list(dict.fromkeys(name for layer in found.layers for name in layer.densities))
    table = Table(
        "layer", "tensors changed", "‖τ⋆‖", *experts, box=None, header_style="bold", pad_edge=False
    )
    for layer in found.layers:
        norms = " → ".join("-" if norm is None else f"{norm:.4g}" for norm in layer.norms)
        shares = [
            "{:.2%} → {:.2%}".format(*layer.densities[name]) if name in layer.densities else "-"
            for name in experts
        ]
        table.add_row(
            "other" if layer.layer is None else str(layer.layer),
            str(layer.num_tensors),
            norms,
            *shares,
        )
    out.print(table)


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:12]


def log(uri: UriArgument, as_json: JsonOption = False) -> None:
    """List the builds behind a name, newest first: when, from what, by which versions."""
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_readable_store
    from mmerge.pipeline.views.compare import read_log

    store_uri, name = split_uri(uri)
    lines = read_log(open_readable_store(store_uri), name)
    if as_json:
        print(
            json.dumps(
                [
                    line.reference.model_dump(mode="json") | {"is_there": line.is_there}
                    for line in lines
                ],
                indent=2,
            )
        )
        return
    table = Table(
        "composite",
        "build",
        "created",
        "from",
        "mmerge",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for line in lines:
        found = line.reference
        sources = ", ".join(f"{owner} {place}" for owner, place in found.sources.items())
        build = found.build[:12] + ("" if line.is_there else " (deleted)")
        table.add_row(
            f"{found.name}@{found.number}",
            build,
            found.created,
            escape(sources),
            found.versions.get("mmerge", "?"),
        )
    out.print(table)


def gc(
    store_uri: Annotated[str, typer.Argument(metavar="STORE", help="the store")],
    delete: Annotated[
        bool, typer.Option("--delete", help="delete; without it, only say what would be deleted")
    ] = False,
    grace: Annotated[
        str,
        typer.Option(
            "--grace", metavar="TIME", help="nothing younger than this is deleted: 7d, 36h, …"
        ),
    ] = "7d",
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=1, help="newest numbers of each name that stay whatever their age"
        ),
    ] = 1,
    surveys: Annotated[
        bool,
        typer.Option(
            "--surveys", help="delete cached surveys too; the next run reads its inputs again"
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what no live build needs. A dry run unless --delete is given; refuses while a run uses
    the store.
    """
    from mmerge.manifests.maintenance.garbage_collection import collect_garbage
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.monitoring.progress import to_size

    period = parse_duration(grace, option="--grace")
    found = collect_garbage(
        open_store(store_uri), grace=period, keep=keep, surveys=surveys, delete=delete
    )
    if as_json:
        keys = [listed.key for listed in found.garbage]
        print(
            json.dumps(
                {
                    "deleted": found.deleted,
                    "keys": keys,
                    "num_bytes": found.num_bytes,
                    "live_builds": list(found.live_builds),
                },
                indent=2,
            )
        )
        return
    for listed in found.garbage:
        out.print(f"  {escape(listed.key)}  {to_size(listed.num_bytes)}", highlight=False)
    word = "deleted" if found.deleted else "would delete"
    out.print(
        f"{word} {len(found.garbage)} objects, {to_size(found.num_bytes)}; {found.num_kept} stay,"
        f" {to_size(found.kept_bytes)}, {len(found.live_builds)} live builds"
    )
    if found.garbage and not found.deleted:
        out.print("give --delete to delete them")


def copy(
    uri: UriArgument,
    target: Annotated[str, typer.Argument(metavar="STORE", help="the store to copy into")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="the composite's name there; the same if absent", show_default=False
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="copy objects that are there already as well, in case they are damaged"
        ),
    ] = False,
) -> None:
    """Copy a build into another store, only what is missing there; every byte is checked on its
    way.
    """
    from mmerge.manifests.maintenance.copy_build import copy_build
    from mmerge.pipeline.monitoring.progress import to_size

    with byte_bar("copy", None) as on_bytes:
        report = copy_build(uri, target, name=name, everything=everything, on_bytes=on_bytes)
    out.print(
        f"copied {report.num_copied} objects, {to_size(report.copied_bytes)}; {report.num_present}"
        " were there already"
    )
    out.print(
        f"  {escape(report.uri)} is {report.reference.name}@{report.reference.number}, build"
        f" {report.build[:12]}"
    )


def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a composite (STORE#NAME), or a folder that 'mmerge export' wrote",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="hf://ORG/REPO", help="the repository, with @BRANCH if not main"),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="if the repository is made, make it private")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="what the commit says", show_default=False)
    ] = None,
) -> None:
    """Upload a composite or an exported checkpoint to the Hugging Face Hub, in one commit."""
    from mmerge.manifests.maintenance.push import push as push_to_hub

    report = push_to_hub(source, target, private=private, message=message)
    out.print(f"pushed {report.num_files} files to {escape(report.uri)}")


def print_forecast(found: Forecast) -> None:
    """Print which shards a run would compute, and why."""
    out.print("\n[bold]what a run would do[/]")
    for shard in found.shards:
        word = {"compute": "[yellow]compute[/]", "reuse": "[green]reuse[/]", "unknown": "unknown"}[
            shard.state
        ]
        out.print(
            f"  {word} {shard.task} {escape(shard.shard)}: {escape(shard.reason)}", highlight=False
        )
    total = f"  {found.count('compute')} to compute, {found.count('reuse')} there already"
    if found.count("unknown"):
        total += (
            f", {found.count('unknown')} known when the inputs of {len(found.to_scan)} shards are"
            " read ('mmerge plan --survey')"
        )
    out.print(total)
