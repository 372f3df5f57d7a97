"""A build is deleted with all references to it, and with nothing that another build needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.digest import to_canonical_json
from mmerge.manifests.errors import ManifestError, StoreError
from mmerge.manifests.format.manifest import manifest_key
from mmerge.manifests.format.references import list_references
from mmerge.manifests.maintenance.delete_build import delete_build
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.build.run import RunReport

Build = Callable[..., RunReport]


@pytest.fixture
def build(lab: Any) -> Build:
    raw = lab.make_all(2)

    def build_it(**changes: Any) -> RunReport:
        return run(make_plan(read_recipe(lab.write_recipe(raw | changes))))

    return build_it


@pytest.fixture
def store(lab: Any) -> Store:
    return open_store(str(lab.folder / "store"), create=True)


def test_a_dry_run_deletes_nothing(build: Build, store: Store) -> None:
    build()
    before = set(store.list())
    deletion = delete_build(store, "tiny", objects=True)
    assert not deletion.deleted
    assert set(store.list()) == before


def test_a_build_goes_with_all_its_references_and_its_objects_stay(
    build: Build, store: Store
) -> None:
    first = build()
    build(name="other")
    assert set(list_references(store)) == {"tiny", "other"}
    deletion = delete_build(store, "tiny@1", delete=True)
    assert deletion.build == first.build
    assert list_references(store) == {}
    assert not list(store.list("builds"))
    assert list(store.list("objects"))
    assert build().is_new
    verify(store.uri).check()


def test_the_number_of_a_deleted_reference_is_not_used_again(build: Build, store: Store) -> None:
    build()
    delete_build(store, "tiny", delete=True)
    assert build().reference.number == 2


def test_references_go_first_and_the_manifest_before_what_it_lists(
    build: Build, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion that is killed at any moment leaves no reference without its build."""
    build()
    deleted: list[str] = []
    delete = type(store).delete

    def note(self: Store, key: str) -> None:
        deleted.append(key)
        delete(self, key)

    monkeypatch.setattr(type(store), "delete", note)
    delete_build(store, "tiny", objects=True, delete=True)
    kinds = [key.split("/")[0] for key in deleted if not key.startswith("claims/")]
    assert kinds[:3] == ["refs", "builds", "builds"]
    assert set(kinds[3:]) == {"files", "objects"}
    assert deleted[1].endswith("/manifest.json")
    for key in deleted:
        if key.startswith("objects/") and key.endswith(".safetensors"):
            assert deleted.index(key.replace(".safetensors", ".json")) < deleted.index(key)


def test_objects_that_another_build_needs_stay(build: Build, store: Store) -> None:
    build()
    second = build(mask_scale=0.9)
    deletion = delete_build(store, "tiny@1", objects=True, delete=True)
    assert deletion.num_shared
    assert any(key.startswith("objects/") for key in deletion.keys)
    verify(f"{store.uri}#{second.build}").check()
    delete_build(store, "tiny", objects=True, delete=True)
    assert not list(store.list("objects"))
    assert not list(store.list("files"))


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_build_with_a_damaged_or_missing_manifest_is_deleted_by_its_digest(
    build: Build, store: Store, damage: bytes | None
) -> None:
    report = build()
    (manifest,) = Path(store.uri).glob("builds/*/manifest.json")
    manifest.unlink() if damage is None else manifest.write_bytes(damage)
    delete_build(store, report.build[:12], delete=True)
    assert not list(store.list("builds"))
    assert list_references(store) == {}


def test_a_damaged_reference_is_deleted_by_its_number_as_its_message_says(
    lab: Any, build: Build, store: Store, cli: Callable[..., tuple[int, str]]
) -> None:
    build()
    (reference,) = Path(store.uri).glob("refs/*/*.json")
    reference.write_bytes(b"{")
    with pytest.raises(ManifestError, match=r"refs/tiny/000001\.json is damaged"):
        verify(store.uri)
    code, text = cli("verify", f"{store.uri}#tiny")
    command = f"mmerge delete {store.uri}#tiny@1 --yes"
    assert code == 1
    assert command in text
    assert cli(*command.split()[1:])[0] == 0
    assert build().reference.number == 2
    verify(store.uri).check()


def test_objects_are_not_judged_while_another_manifest_cannot_be_read(
    build: Build, store: Store
) -> None:
    first = build()
    build(mask_scale=0.9)
    (Path(store.uri) / "builds" / first.build / "manifest.json").write_bytes(b"{")
    before = set(store.list())
    with pytest.raises(ManifestError, match="is unknown, so nothing was deleted"):
        delete_build(store, "tiny@2", objects=True, delete=True)
    assert set(store.list()) == before


@pytest.mark.parametrize("fragment", ["tiny@1", "tiny@2"])
def test_objects_are_not_judged_by_a_manifest_that_lost_some_of_them(
    build: Build, store: Store, fragment: str
) -> None:
    build()
    second = build(mask_scale=0.9)
    manifest = json.loads(store.read(manifest_key(second.build)))
    manifest["entries"] = manifest["entries"][:1]
    store.put(manifest_key(second.build), to_canonical_json(manifest))
    before = set(store.list())
    with pytest.raises(ManifestError, match="is unknown, so nothing was deleted"):
        delete_build(store, fragment, objects=True, delete=True)
    assert set(store.list()) == before
    delete_build(store, fragment, delete=True)


def test_a_deletion_refuses_while_a_run_uses_the_store(build: Build, store: Store) -> None:
    build()
    before = set(store.list())
    with Lease(store, "run"), pytest.raises(StoreError, match="in use by another process"):
        delete_build(store, "tiny", delete=True)
    assert set(store.list()) == before


@pytest.mark.parametrize("fragment", ["", "nobody", "tiny@9", "ffffff", "tiny@x", "../refs"])
def test_an_unknown_build_is_refused(build: Build, store: Store, fragment: str) -> None:
    build()
    with pytest.raises(ManifestError, match="tiny"):
        delete_build(store, fragment, delete=True)


def test_the_command_lists_first_and_deletes_with_yes(
    build: Build, store: Store, cli: Callable[..., tuple[int, str]]
) -> None:
    build()
    code, text = cli("delete", f"{store.uri}#tiny")
    assert code == 0
    assert "would delete build" in text
    assert "dry run: add --yes" in text
    assert list_references(store)
    code, text = cli("delete", f"{store.uri}#tiny", "--objects", "--yes")
    assert code == 0
    assert "deleted build" in text
    assert not list_references(store)
