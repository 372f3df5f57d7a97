"""Inputs from a model hub, and pushing to it, against a small hub of this process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from mmerge.manifests.errors import (
    BuildDiffers,
    CheckpointError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from mmerge.manifests.format.manifest import read_manifest, to_manifest_bytes
from mmerge.manifests.format.publish import make_table_entry
from mmerge.manifests.format.references import open_build
from mmerge.manifests.maintenance import push as push_module
from mmerge.manifests.maintenance.push import push
from mmerge.manifests.stores.hub import HubStore
from mmerge.manifests.stores.open import open_readable_store, pin_uri
from mmerge.pipeline import make_plan, read_recipe, run, verify


def upload(hub: HubServer, lab: Any, name: str) -> str:
    files = {path.name: path.read_bytes() for path in (lab.folder / name).iterdir()}
    return hub.commit(f"org/{name}", files | {"pytorch_model.bin": b"never fetched" * 1000})


def make_hub_recipe(hub: HubServer, lab: Any) -> Path:
    raw = lab.make_all()
    for name in ("base", *raw["experts"]):
        upload(hub, lab, name)
    raw["base"] = "hf://org/base"
    for name, expert in raw["experts"].items():
        expert["path"] = f"hf://org/{name}@main"
    return lab.write_recipe(raw)


def test_a_revision_is_pinned_to_its_commit_and_the_manifest_records_it(
    hub: HubServer, lab: Any
) -> None:
    recipe = make_hub_recipe(hub, lab)
    report = run(make_plan(read_recipe(recipe)))
    assert report.manifest is not None
    assert report.manifest.base.source == f"hf://org/base@{hub.branches['org/base']['main']}"
    assert [expert.source for expert in report.manifest.experts] == [
        f"hf://org/{name}@{hub.branches[f'org/{name}']['main']}"
        for name in ("image", "audio", "video")
    ]
    assert report.reference.sources["audio"] == report.manifest.experts[1].source
    raw = lab.make_all()
    local = run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "local"}))))
    assert local.manifest is not None
    assert [entry.digest for entry in local.manifest.entries] == [
        entry.digest for entry in report.manifest.entries
    ]


def test_a_plan_reads_headers_by_range_and_a_run_fetches_only_the_files_it_needs(
    hub: HubServer, lab: Any
) -> None:
    recipe = make_hub_recipe(hub, lab)
    plan = make_plan(read_recipe(recipe))
    weights = [
        line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line
    ]
    assert len(weights) == 4
    assert all("bytes=0-" in line for line in weights)
    run(plan)
    assert not any("pytorch_model.bin" in line for line in hub.requests)
    before = len(hub.requests)
    assert not run(plan).is_new
    assert not [
        line for line in hub.requests[before:] if line.startswith("GET") and "/resolve/" in line
    ], "the node's cache was not used"


def test_a_branch_that_moved_gives_another_commit_and_only_then(hub: HubServer, lab: Any) -> None:
    recipe = make_hub_recipe(hub, lab)
    first = make_plan(read_recipe(recipe))
    assert make_plan(read_recipe(recipe)).recipe == first.recipe
    hub.commit("org/audio", {"note.txt": b"new"})
    assert make_plan(read_recipe(recipe)).recipe.experts[1].uri != first.recipe.experts[1].uri
    run(first)  # a plan keeps its commit


def test_offline_a_build_runs_from_the_cache_and_says_what_the_cache_lacks(
    hub: HubServer, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_hub_recipe(hub, lab)
    online = run(make_plan(read_recipe(recipe)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = run(make_plan(read_recipe(recipe)), fresh=True)
    assert offline.build == online.build
    assert hub.requests == []
    with pytest.raises(
        StoreUnavailable, match=r"hf://org/other@main: offline, and the cache does not know"
    ):
        pin_uri("hf://org/other")


def test_what_the_hub_does_not_have_is_named(hub: HubServer, lab: Any) -> None:
    with pytest.raises(NotFound, match=r"hf://org/none: main: not found on the hub"):
        pin_uri("hf://org/none")
    commit = hub.commit("org/x", {"a.json": b"{}"})
    with pytest.raises(NotFound, match="not found"):
        pin_uri("hf://org/x@v9")
    store = open_readable_store(f"hf://org/x@{commit}")
    assert sorted(store.list()) == ["a.json"]
    with pytest.raises(NotFound, match=r"b\.json: not found"):
        store.read("b.json")
    for bad in ("hf://x", "hf://a/b/c", "hf://a/b@", "hf://../x/y"):
        with pytest.raises(StoreError, match="expected hf://ORG/REPO"):
            pin_uri(bad)
    raw = lab.make_all()
    raw["experts"]["audio"]["path"] = "hf://org/none"
    with pytest.raises(CheckpointError, match=r"expert 'audio': hf://org/none"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_a_pushed_composite_verifies_from_the_hub_and_is_numbered(hub: HubServer, lab: Any) -> None:
    raw = lab.make_all()
    first = run(make_plan(read_recipe(lab.write_recipe(raw))))
    report = push(str(lab.folder / "store"), "hf://org/composite")
    verify(report.uri + "#tiny").check()
    assert first.manifest is not None
    sent = [line for line in hub.requests if line.startswith("PUT /lfs/")]
    assert len(sent) == len({entry.key for entry in first.manifest.entries}) + 1, (
        "objects and the table go as large files"
    )
    store, build = open_build("hf://org/composite#tiny@1")
    assert (build, read_manifest(store, build)) == (first.build, first.manifest)
    assert not [
        key
        for key in open_readable_store("hf://org/composite").list()
        if key.startswith(("surveys", "claims", "probe"))
    ]
    push(str(lab.folder / "store"), "hf://org/composite")
    assert [line for line in hub.requests if line.startswith("PUT /lfs/")] == sent, (
        "what the hub has is not sent again"
    )
    second = run(make_plan(read_recipe(lab.write_recipe(raw | {"mask_scale": 0.9}))))
    push(str(lab.folder / "store"), "hf://org/composite")
    assert open_build("hf://org/composite#tiny")[1] == second.build
    assert open_build("hf://org/composite#tiny@1")[1] == first.build


def test_a_push_replaces_no_build_of_the_repository(hub: HubServer, lab: Any) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all(1))))
    manifest = run(plan).manifest
    assert manifest is not None
    folder = lab.folder / "store"
    push(str(folder), "hf://org/composite")
    # Equal rows, other bytes: as another version of pyarrow writes them.
    table_path = folder / manifest.table.key
    sink = io.BytesIO()
    pq.write_table(pq.read_table(table_path), sink, compression="snappy")
    table = make_table_entry(manifest.build, sink.getvalue())
    (folder / table.key).write_bytes(sink.getvalue())
    manifest_path = folder / f"builds/{manifest.build}/manifest.json"
    manifest_path.write_bytes(to_manifest_bytes(manifest.model_copy(update={"table": table})))
    push(str(folder), "hf://org/composite")
    pushed = open_readable_store("hf://org/composite")
    assert read_manifest(pushed, manifest.build).table == manifest.table
    verify("hf://org/composite#tiny").check()
    entry = next(entry for entry in manifest.entries if entry.role == "merge")
    other = entry.model_copy(update={"digest": "0" * 64})
    entries = tuple(other if each is entry else each for each in manifest.entries)
    with pytest.raises(BuildDiffers, match=f"other bytes of shard {entry.shard}"):
        push_module._find_kept_keys(
            HubStore.open("hf://org/composite", create=False),
            manifest.model_copy(update={"entries": entries}),
        )


def test_an_export_is_pushed_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    push(str(folder), "hf://org/exported")
    assert hub.commits["org/exported"][hub.branches["org/exported"]["main"]] == {
        "config.json": b"{}",
        "model.safetensors": b"x" * 1000,
    }


def test_a_push_uses_no_number_that_was_deleted(hub: HubServer, lab: Any) -> None:
    report = run(make_plan(read_recipe(lab.write_recipe(lab.make_all(1)))))
    hub.commit("org/composite", {"refs/tiny/000001.deleted": b"{}"})
    push(str(lab.folder / "store"), "hf://org/composite")
    assert open_build("hf://org/composite#tiny")[1] == report.build


def test_a_push_that_another_one_overtakes_changes_nothing(
    hub: HubServer, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_plan(read_recipe(lab.write_recipe(lab.make_all(1)))))
    source = str(lab.folder / "store")
    overtaking = b"the first number of another writer"

    def count(*arguments: Any) -> tuple[int, bool]:
        hub.commit("org/composite", {"refs/tiny/000001.json": overtaking})
        return 1, False

    monkeypatch.setattr(push_module, "_next_number", count)
    with pytest.raises(StoreError, match=r"somebody else has pushed there meanwhile"):
        push(source, "hf://org/composite")
    store = open_readable_store("hf://org/composite")
    assert store.read("refs/tiny/000001.json") == overtaking
