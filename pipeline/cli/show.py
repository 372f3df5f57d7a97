"""Commands that read builds: `mmerge show`, `mmerge log`, `mmerge diff`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmerge.pipeline.cli.options import JsonOption, UriArgument
from mmerge.pipeline.cli.output import out


def show(
    uri: UriArgument,
    as_json: JsonOption = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="add the mask statistics of every layer")
    ] = False,
) -> None:
    """Show a composite: its inputs, its masks and how the experts overlap.

    For a store with several composites, list them.
    """
    from mmerge.manifests.format.references import list_references, split_uri
    from mmerge.manifests.stores.open import open_readable_store
    from mmerge.pipeline.views.build_report import print_build, print_references
    from mmerge.pipeline.views.build_summary import read_build, read_references, to_json

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


def log(uri: UriArgument, as_json: JsonOption = False) -> None:
    """List the builds of a name, newest first: when, from which inputs, by which version."""
    from mmerge.manifests.format.references import split_uri
    from mmerge.manifests.stores.open import open_readable_store
    from mmerge.pipeline.views.build_report import print_log
    from mmerge.pipeline.views.compare import log_to_json, read_log

    store_uri, name = split_uri(uri)
    entries = read_log(open_readable_store(store_uri), name)
    if as_json:
        print(json.dumps(log_to_json(entries), indent=2))
    else:
        print_log(entries, out)


def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="a composite: STORE#NAME@1")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="another one: STORE#NAME@2")],
    as_json: JsonOption = False,
) -> None:
    """Show what changed between two builds: inputs, parameters, objects, statistics per layer."""
    from mmerge.pipeline.views.build_report import print_difference
    from mmerge.pipeline.views.compare import compare_builds, difference_to_json

    difference = compare_builds(before, after)
    if as_json:
        print(json.dumps(difference_to_json(difference), indent=2))
    else:
        print_difference(difference, out)
