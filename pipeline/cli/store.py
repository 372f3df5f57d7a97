"""Commands that maintain stores: `mmerge verify`, `gc`, `delete`, `copy` and `push`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.pipeline.cli.options import (
    IdentityOption,
    IssuerOption,
    JsonOption,
    UriArgument,
    parse_duration,
)
from mmerge.pipeline.cli.output import out, show_bytes
from mmerge.pipeline.monitoring.printable import escape


def verify(
    uri: UriArgument,
    sample: Annotated[
        float, typer.Option("--sample", help="share of the tensors to read; 1 reads everything")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="seed of the sample [default: another sample every time]",
            show_default=False,
        ),
    ] = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
) -> None:
    """Re-read a composite and compare every digest with its manifest.

    With --identity, also require a signature of that identity; an exported folder is then compared
    with its signature. The exit code is 1 if anything is damaged; the message names it.
    """
    from mmerge.manifests.maintenance.signatures import find_exported_folder
    from mmerge.manifests.maintenance.verify import verify as verify_build
    from mmerge.pipeline.cli.signatures import verify_signature
    from mmerge.pipeline.monitoring.progress import to_size

    signed_by = verify_signature(uri, identity=identity, issuer=issuer)
    if find_exported_folder(uri) is not None:
        out.print(f"[green]verified[/] {escape(uri)}: all files are as signed ({signed_by})")
        return
    with show_bytes("verify") as bar:
        report = verify_build(uri, sample=sample, seed=seed, on_bytes=bar.advance)
    report.check()
    scope = "all digests" if sample == 1 else f"the digests of a {sample:.1%} sample of the tensors"
    out.print(
        f"[green]verified[/] build {report.build[:SHOWN_DIGITS]}: {report.num_objects} objects,"
        f" {to_size(report.num_bytes)}, {scope} are equal"
        + (f"; signed ({signed_by})" if signed_by else "")
    )


def gc(
    store_uri: Annotated[str, typer.Argument(metavar="STORE", help="the store")],
    delete: Annotated[
        bool, typer.Option("--delete", help="delete; without it, only list what would be deleted")
    ] = False,
    grace: Annotated[
        str,
        typer.Option(
            "--grace", metavar="TIME", help="keep everything younger than this: 7d, 36h, …"
        ),
    ] = "7d",
    keep: Annotated[
        int,
        typer.Option("--keep", min=1, help="newest builds of each name to keep whatever their age"),
    ] = 1,
    scans: Annotated[
        bool,
        typer.Option(
            "--scans", help="also delete cached input scans; the next run scans its inputs again"
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the objects of a store that no live build needs (garbage collection).

    A dry run unless --delete is given. Refused while a run uses the store.
    """
    from mmerge.manifests.maintenance.garbage_collection import collect_garbage
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline.monitoring.progress import to_size

    period = parse_duration(grace, option="--grace")
    report = collect_garbage(
        open_store(store_uri), grace=period, keep=keep, scans=scans, delete=delete
    )
    if as_json:
        document = {
            "deleted": report.deleted,
            "keys": [listed.key for listed in report.garbage],
            "num_bytes": report.num_bytes,
            "live_builds": list(report.live_builds),
        }
        print(json.dumps(document, indent=2))
        return
    for listed in report.garbage:
        out.print(f"  {escape(listed.key)}  {to_size(listed.num_bytes)}", highlight=False)
    verb = "deleted" if report.deleted else "would delete"
    out.print(
        f"{verb} {len(report.garbage)} objects, {to_size(report.num_bytes)};"
        f" {len(report.live_builds)} live builds keep {report.num_kept} objects,"
        f" {to_size(report.kept_bytes)}"
    )
    if report.garbage and not report.deleted:
        out.print("dry run: add --delete to delete them")


def delete(
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI", help="build: STORE#NAME (its newest), STORE#NAME@N, …#DIGEST"
        ),
    ],
    objects: Annotated[
        bool,
        typer.Option(
            "--objects", help="also delete the objects that no other build of the store needs"
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="delete; without it, only list what would be deleted")
    ] = False,
) -> None:
    """Delete one build: all references to it, its manifest and its table.

    A dry run unless --yes is given. Refused while a run uses the store. Without --objects its
    objects stay until 'mmerge gc' deletes those that no build needs. Damage is no obstacle.
    """
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.maintenance.delete_build import delete_build
    from mmerge.manifests.stores.open import open_store

    store_uri, fragment = split_uri(uri)
    deletion = delete_build(open_store(store_uri), fragment, objects=objects, delete=yes)
    for key in deletion.keys:
        out.print(f"  {escape(key)}", highlight=False)
    what = f"build {deletion.build[:SHOWN_DIGITS]}" if deletion.build else "a damaged reference"
    verb = "deleted" if deletion.deleted else "would delete"
    stay = f"; {deletion.num_shared} objects that other builds need stay" if objects else ""
    out.print(f"{verb} {what}: {len(deletion.keys)} objects of the store{stay}")
    if not deletion.deleted:
        out.print("dry run: add --yes to delete them")


def copy(
    uri: UriArgument,
    target: Annotated[str, typer.Argument(metavar="STORE", help="the store to copy to")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="name of the composite in that store [default: the same]",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="also read what the target already has, and repair what is damaged there"
        ),
    ] = False,
) -> None:
    """Copy a build to another store: the objects that it lacks, each checked against its digest.

    Other bytes of the same build in that store are never replaced: the copy is refused.
    """
    from mmerge.manifests.maintenance.copy_build import copy_build
    from mmerge.pipeline.monitoring.progress import to_size

    with show_bytes("copy") as bar:
        report = copy_build(uri, target, name=name, everything=everything, on_bytes=bar.advance)
    out.print(
        f"copied {report.num_copied} objects, {to_size(report.copied_bytes)};"
        f" {report.num_present} were in the store already"
    )
    if report.repaired:
        out.print(f"repaired {len(report.repaired)} damaged objects there:")
        for key in report.repaired:
            out.print(f"  {escape(key)}", highlight=False)
    reference = f"{report.reference.name}@{report.reference.number}"
    out.print(f"  {escape(report.uri)} is {reference}, build {report.build[:SHOWN_DIGITS]}")


def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="composite (STORE#NAME), or folder written by 'mmerge export'"
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="hf://ORG/REPO", help="Hub repository; add @BRANCH if not main"),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="make the repository private if it is created")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="commit message", show_default=False)
    ] = None,
) -> None:
    """Upload a composite or an exported checkpoint to the Hugging Face Hub, in one commit."""
    from mmerge.manifests.maintenance.push import push as push_to_hub

    report = push_to_hub(source, target, private=private, message=message)
    out.print(f"pushed {report.num_files} files to {escape(report.uri)}")
