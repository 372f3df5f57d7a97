"""`mmerge delete`: remove one build from a store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.pipeline.cli.output import out


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
