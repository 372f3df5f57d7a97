from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import ManifestError
from mmerge.manifests.format.manifest import (
    BaseRecord,
    Manifest,
    TableEntry,
    manifest_key,
    read_manifest,
    to_manifest_bytes,
)
from mmerge.manifests.format.references import (
    find_build,
    list_references,
    read_reference,
    write_reference,
)
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store

BUILD, OTHER = "a" * 64, "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), create=True)


def make_manifest(build: str = BUILD, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "build": build,
        "kind": "plain",
        "method": "ties",
        "parameters": {"density": 0.2},
        "merge": "all",
        "dtype": "BF16",
        "base": BaseRecord(revision="r", files=()),
        "experts": (),
        "entries": (),
        "table": TableEntry(key="t", num_bytes=0, digest=BUILD),
    }
    return Manifest(**fields | changes)


def put_manifest(store: Store, manifest: Manifest) -> None:
    store.put_new(manifest_key(manifest.build), to_manifest_bytes(manifest))


def edit(store: Store, change: dict[str, Any]) -> None:
    raw = json.loads(store.read(manifest_key(BUILD)))
    store.put(manifest_key(BUILD), json.dumps(raw | change).encode())


def test_a_manifest_is_read_as_it_was_written(store: Store) -> None:
    put_manifest(store, make_manifest())
    assert read_manifest(store, BUILD) == make_manifest()


def test_a_manifest_of_an_unknown_version_is_refused_with_both_versions(store: Store) -> None:
    put_manifest(store, make_manifest())
    edit(store, {"version": 99, "invented": True})
    with pytest.raises(ManifestError, match="format version 99, this mmerge reads version 1"):
        read_manifest(store, BUILD)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "no mmerge-composite manifest"),
        ({"invented": 1}, "invented"),
        ({"kind": "soup"}, "kind"),
        ({"build": OTHER}, "describes build"),
        ({"entries": [{"key": "../../etc/passwd"}]}, "entries"),
        (
            {
                "entries": [
                    {"key": "../x", "shard": "s", "role": "base", "num_bytes": 1, "digest": BUILD}
                ]
            },
            "no valid object name",
        ),
    ],
)
def test_a_changed_manifest_is_refused(store: Store, change: dict[str, Any], match: str) -> None:
    put_manifest(store, make_manifest())
    edit(store, change)
    with pytest.raises(ManifestError, match=match):
        read_manifest(store, BUILD)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"a": NaN}', b'{"a": 1, "a": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_manifest_is_refused(store: Store, data: bytes) -> None:
    store.put(manifest_key(BUILD), data)
    with pytest.raises(ManifestError):
        read_manifest(store, BUILD)


def test_references_are_numbered_created_once_and_the_highest_is_the_latest(store: Store) -> None:
    for build in (BUILD, OTHER):
        put_manifest(store, make_manifest(build))
    first, moved = write_reference(store, "n", BUILD, sources={}, versions={})
    assert (first.number, moved) == (1, True)
    again, moved = write_reference(store, "n", BUILD, sources={}, versions={})
    assert (again.number, moved) == (1, False)
    second, moved = write_reference(store, "n", OTHER, sources={}, versions={})
    assert (second.number, moved) == (2, True)
    assert list_references(store) == {"n": [1, 2]}
    assert read_reference(store, "n", 1).build == BUILD
    assert (
        find_build(store, "")
        == find_build(store, "n")
        == find_build(store, "n@latest")
        == find_build(store, "n@2")
        == OTHER
    )
    assert find_build(store, "n@1") == find_build(store, "aaaaaa") == BUILD
    for fragment, match in (
        ("n@7", "no number"),
        ("m", "names there: n"),
        ("ffffff", "no composite"),
    ):
        with pytest.raises(ManifestError, match=match):
            find_build(store, fragment)
    write_reference(store, "m", BUILD, sources={}, versions={})
    with pytest.raises(ManifestError, match="#m, #n"):
        find_build(store, "")


def test_an_empty_store_says_how_to_fill_it(store: Store) -> None:
    with pytest.raises(ManifestError, match="mmerge run"):
        find_build(store, "")
