"""Every interleaving of two writers and a collection, at each of their store calls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from models.exploration import Contents, Explorer, Program
from models.protocol_programs import (
    NAME,
    SmallBuild,
    collect,
    collect_entries,
    refer,
    refer_and_collect,
    write_build,
)
from models.simulated_modules import simulated_modules

import mmerge.manifests.maintenance.manifest_checks as checks_module
from mmerge.manifests.format.references import reference_key, write_reference
from mmerge.manifests.stores.memory import MemoryStore

FACTOR = int(os.environ.get("MMERGE_MODEL_FACTOR", "1"))
DAY = 86_400.0
OLD = SmallBuild.make("f", "x")
FIRST = SmallBuild.make("a", "xp")
SECOND = SmallBuild.make("b", "p")
"""Both share an object with the old build, and one with each other."""
THIRD = SmallBuild.make("c", "q")
"""Its object is garbage at first: a run was killed before it committed it."""
BUILDS = {small.build: small for small in (OLD, FIRST, SECOND, THIRD)}


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    with simulated_modules():
        yield


def stored_builds() -> Contents:
    """A store whose name has one number, of the old build, and a day has passed since."""
    store = MemoryStore("memory://explored")
    write_reference(store, NAME, OLD.build, sources={}, versions={})
    return OLD.contents(0.0) | {key: (store.read(key), 0.0) for key in store.list()}


def check_result(process: int, result: Any, contents: Contents) -> str | None:
    """A writer that reports success has a whole build under its number."""
    if not isinstance(result, tuple):
        return None
    build, number = result
    missing = BUILDS[build].missing(contents)
    if missing:
        return f"process {process} reported {NAME}@{number}, but {missing[0]} is missing"
    if f"refs/{NAME}/{number:06d}.deleted" in contents:
        return None  # a later build has the name, and a collection came before the report
    if reference_key(NAME, number) not in contents:
        return f"process {process} reported {NAME}@{number}, which is not there"
    return None


def check_effect(
    process: int, verb: str, key: str, before: Contents, after: Contents
) -> str | None:
    """A reference names a whole build when it is created, and while it is the newest."""
    if verb == "delete":
        return _find_lost_key(key, before)
    is_reference = key.startswith("refs/") and key.endswith(".json")
    if not is_reference or verb != "put_new" or key in before:
        return None
    if f"{key.removesuffix('.json')}.deleted" in before:
        return None  # a late writer: readers see the mark
    missing = BUILDS[json.loads(after[key][0])["build"]].missing(after)
    return f"{key} was created, but {missing[0]} is missing" if missing else None


def _find_lost_key(key: str, before: Contents) -> str | None:
    """Return what is wrong with a deletion: the newest build of the name needs the key."""
    numbers = [name for name in before if name.startswith("refs/") and name.endswith(".json")]
    live = [name for name in numbers if f"{name.removesuffix('.json')}.deleted" not in before]
    if not live:
        return None
    newest = max(live)
    build = json.loads(before[newest][0])["build"]
    if key in BUILDS[build].needed_keys:
        return f"{key} was deleted, which the build of {newest} needs"
    return None


PROGRAMS: dict[str, Program] = {
    "first": lambda store: write_build(store, FIRST),
    "second": lambda store: write_build(store, SECOND),
    "third": lambda store: write_build(store, THIRD),
    "refer to first": lambda store: refer(store, FIRST),
    "refer to second": lambda store: refer(store, SECOND),
    "gc": lambda store: collect(store, 0.0),
    "interrupted gc": collect_entries,
    "refer to others and gc": lambda store: refer_and_collect(store, SECOND, OLD),
}


def explore(*names: str, jumps: int, **options: Any) -> str | None:
    """Explore all interleavings of some programs; return the first fault, None if there is none."""
    whole = bool({"first", "third"} & set(names))
    explorer = Explorer(
        tuple(PROGRAMS[name] for name in names),
        check_effect if whole else lambda *effect: None,
        check_result if whole else lambda *result: None,
        jumps=jumps,
        **options,
    )
    contents = stored_builds()
    if "third" in names:
        contents |= {key: item for key, item in THIRD.contents(0.0).items() if "objects/" in key}
    if not whole:
        contents |= FIRST.contents(0.0) | SECOND.contents(0.0)
    # The builds are made up, and a collection refuses manifests that no run would write.
    with mock.patch.object(checks_module, "find_manifest_damages", return_value=[]):
        fault = explorer.explore(contents, seconds=DAY)
    assert fault is not None or explorer.num_states > 100
    # Otherwise the search would be one of processes that give up, and find nothing for ever.
    assert fault is not None or "NotFound" not in explorer.errors
    if fault is None and "gc" in " ".join(names) and jumps:
        assert any(key.startswith("builds/") for key in explorer.deleted)
        assert any(key.startswith("objects/") for key in explorer.deleted)
    return fault


def test_no_interleaving_of_a_writer_and_a_collection_loses_a_build() -> None:
    """Including those in which both are suspended at one point until their leases are stale."""
    assert explore("first", "gc", jumps=1) is None


FROZEN = {"has_frozen_clocks": True}
A_DAY = {"jump_seconds": DAY + 3600.0, "prompt_verbs": frozenset({"delete", "put_new"})}
"""Longer than an announcement lives. A create follows at once upon the check before it."""


@pytest.mark.parametrize(
    ("collection", "options"),
    [("gc", {}), ("gc", FROZEN), ("gc", A_DAY), ("interrupted gc", {})],
    ids=["minutes", "frozen clocks", "a day", "interrupted"],
)
def test_no_interleaving_of_a_writer_and_a_collection_loses_what_the_writer_reuses(
    collection: str, options: dict[str, Any]
) -> None:
    assert explore("third", collection, jumps=1, **options) is None


def test_no_interleaving_of_two_writers_loses_a_build() -> None:
    assert explore("first", "second", jumps=0) is None


def test_no_interleaving_of_two_late_writers_and_a_collection_gives_a_number_two_meanings() -> None:
    """The writers hold no lease: theirs have long expired."""
    assert explore("refer to first", "refer to second", "gc", jumps=0) is None


if FACTOR > 1:  # millions of states

    @pytest.mark.parametrize(
        ("names", "jumps"),
        [
            (("refer to first", "refer to others and gc"), 1),
            (("first", "gc"), 2),
            (("third", "gc"), 2),
            (("refer to first", "refer to second", "gc"), 1),
            (("first", "second", "gc"), 0),
        ],
        ids=[
            "late writer and others",
            "writer and collection",
            "reusing writer and collection",
            "late writers and collection",
            "writers and collection",
        ],
    )
    def test_no_interleaving_loses_a_build_in_a_larger_search(
        names: tuple[str, ...], jumps: int
    ) -> None:
        assert explore(*names, jumps=jumps) is None
