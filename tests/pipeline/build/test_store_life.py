"""The life of a store: rebuilds that compute what changed, a plan that says so, and the commands
log, diff, gc and copy.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import DamagedObject, ManifestError, RecipeError, StoreError
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.build.forecast import Forecast, make_forecast
from mmerge.pipeline.build.run import RunReport, _Run
from mmerge.pipeline.cli.options import parse_duration
from mmerge.pipeline.views.compare import compare_builds, read_log

CHANGED = "language_model.model.layers.1.mlp.up_proj.weight"


def build(lab: Any, raw: dict[str, Any]) -> RunReport:
    return run(make_plan(read_recipe(lab.write_recipe(raw))))


def forecast(lab: Any, raw: dict[str, Any], *, scan: bool = False) -> Forecast:
    return make_forecast(make_plan(read_recipe(lab.write_recipe(raw))), scan=scan)


def change_one_layer(lab: Any) -> None:
    lab.make_expert(
        "audio", 1, change=lambda tensors: tensors.update({CHANGED: tensors[CHANGED] + 1})
    )


def keys(store: Store, prefix: str) -> set[str]:
    return set(store.list(prefix))


def test_one_changed_layer_writes_one_object_its_entry_and_the_records_of_the_build(
    lab: Any,
) -> None:
    raw = lab.make_all() | {"scope": "tensor"}
    first = build(lab, raw)
    store = open_store(str(lab.folder / "store"))
    before = {listed.key: listed.modified for listed in store.list_objects()}
    change_one_layer(lab)
    second = build(lab, raw)
    assert second.num_computed["merge"] == 1
    assert second.num_computed["copy"] == 0
    written = {
        listed.key for listed in store.list_objects() if before.get(listed.key) != listed.modified
    }
    assert second.manifest is not None
    assert first.manifest is not None
    (new,) = {entry.key for entry in second.manifest.entries} - {
        entry.key for entry in first.manifest.entries
    }
    assert {key for key in written if not key.startswith("surveys/")} == {
        new,
        new.replace(".safetensors", ".json"),
        f"builds/{second.build}/manifest.json",
        second.manifest.table.key,
        "refs/tiny/000002.json",
        *(key for key in written if key.startswith("files/")),
    }


def test_a_plan_says_which_shards_would_be_computed_and_why(lab: Any) -> None:
    raw = lab.make_all() | {"scope": "tensor"}
    new = forecast(lab, raw)
    assert new.count("compute") == len(new.shards) == 13
    assert not (lab.folder / "store").exists(), "a plan wrote"
    build(lab, raw)
    assert forecast(lab, raw).count("reuse") == 13
    other = {shard.shard: shard for shard in forecast(lab, raw | {"mask_scale": 0.9}).shards}
    assert {shard.reason for shard in other.values() if shard.state == "compute"} == {
        "numbers of the recipe changed"
    }
    assert sum(shard.state == "reuse" for shard in other.values()) == 8
    change_one_layer(lab)
    unread = forecast(lab, raw)
    states = {shard.shard: shard.state for shard in unread.shards}
    assert {states.pop(name) for name in ("carry/image", "carry/video")} == {"reuse"}
    assert set(states.values()) == {"unknown"}, "they depend on the changed file"
    assert "layers.1" in unread.to_scan
    store = open_store(str(lab.folder / "store"))
    objects = keys(store, "objects")
    found = [shard for shard in forecast(lab, raw, scan=True).shards if shard.state == "compute"]
    assert [(shard.shard, shard.reason) for shard in found] == [
        ("layers.1", "expert 'audio' changed, trim thresholds moved")
    ]
    assert keys(store, "objects") == objects
    report = build(lab, raw)
    assert report.num_computed["merge"] == len(found)
    assert report.num_computed["scan"] == 0


def test_a_difference_names_inputs_numbers_and_layers(lab: Any) -> None:
    raw = lab.make_all() | {"scope": "tensor"}
    build(lab, raw)
    change_one_layer(lab)
    build(lab, raw)
    build(lab, raw | {"mask_scale": 0.9})
    place = str(lab.folder / "store")
    found = compare_builds(place + "#tiny@1", place + "#tiny@2")
    assert [name for name, _, _ in found.inputs] == ["expert 'audio'"]
    assert not found.parameters
    assert [layer.layer for layer in found.layers] == [1]
    assert found.num_new == 1
    before, after = found.layers[0].norms
    assert before is not None
    assert after is not None
    assert after > before
    other = compare_builds(place + "#tiny@2", place + "#tiny@3")
    assert other.parameters == (("mask_scale", 0.75, 0.9),)
    assert not other.inputs
    assert all(
        after <= before for layer in other.layers for before, after in layer.densities.values()
    ), "a larger scale never adds a bit"
    assert compare_builds(place, place + "#tiny@3").is_empty
    lines = read_log(open_store(place), "")
    assert [line.reference.number for line in lines] == [3, 2, 1]
    assert all(line.is_stored for line in lines)


def grow_old(store: Store, *, days: float = 30) -> None:
    then = time.time() - days * 86_400
    for key in store.list():
        os.utime(Path(store.uri) / key, (then, then))


def test_collection_is_dry_spares_the_young_the_live_and_what_they_share_and_deletes_the_rest(
    lab: Any,
) -> None:
    raw = lab.make_all()
    first = build(lab, raw)
    second = build(lab, raw | {"mask_scale": 0.9})
    store = open_store(str(lab.folder / "store"))
    (Path(store.uri) / "objects" / ".half.0123.partial").write_bytes(b"half")
    assert collect_garbage(store, delete=True).garbage == (), "the young stay"
    grow_old(store)
    os.utime(Path(store.uri) / "objects" / ".half.0123.partial", (0, 0))
    before = keys(store, "")
    found = collect_garbage(store)
    assert keys(store, "") == before, "a dry run deleted"
    assert found.dead_builds == (first.build,)
    assert first.manifest is not None
    assert second.manifest is not None
    dead = {entry.key for entry in first.manifest.entries} - {
        entry.key for entry in second.manifest.entries
    }
    assert {listed.key for listed in found.garbage} == {
        "refs/tiny/000001.json",
        f"builds/{first.build}/manifest.json",
        first.manifest.table.key,
        *dead,
        *(key.replace(".safetensors", ".json") for key in dead),
        "objects/.half.0123.partial",
    }
    assert collect_garbage(store, keep=2).dead_builds == ()
    assert collect_garbage(store, delete=True).deleted
    garbage = {listed.key for listed in found.garbage}
    assert keys(store, "") == before - garbage | {"refs/tiny/000001.deleted"}
    assert not list(store.list_partials())
    verify(store.uri).check()
    again = build(lab, raw)
    assert (again.build, again.reference.number) == (first.build, 3)
    verify(store.uri).check()


def test_a_collection_refuses_while_a_run_is_at_work_and_a_run_waits_for_a_collection(
    lab: Any,
) -> None:
    build(lab, lab.make_all())
    store = open_store(str(lab.folder / "store"))
    grow_old(store)
    with Lease(store, "run"), pytest.raises(StoreError, match="in use by another process"):
        collect_garbage(store, delete=True)
    with (
        Lease(store, "collect"),
        Lease(store, "run") as lease,
        pytest.raises(StoreError, match="held by another process"),
    ):
        lease.wait_for_none("collect", seconds=0.1, pause=0.05)
    killed = Lease(store, "run")
    killed.renew()
    os.utime(Path(store.uri) / killed.key, (time.time() - 3600,) * 2)
    assert collect_garbage(store, delete=True).deleted, (
        "a run that was killed an hour ago holds nothing"
    )


def test_a_collection_refuses_where_a_manifest_cannot_be_read(lab: Any) -> None:
    report = build(lab, lab.make_all())
    store = open_store(str(lab.folder / "store"))
    store.put(f"builds/{report.build}/manifest.json", b"{}")
    grow_old(store)
    with pytest.raises(ManifestError):
        collect_garbage(store, delete=True)


def test_unfinished_objects_of_a_killed_run_go_after_the_grace_period(lab: Any) -> None:
    build(lab, lab.make_all())
    store = open_store(str(lab.folder / "store"))
    store.put("objects/" + "a" * 64 + ".safetensors", b"x" * 100)
    assert collect_garbage(store, grace=timedelta(hours=1)).garbage == ()
    grow_old(store, days=1)
    assert [listed.key for listed in collect_garbage(store, grace=timedelta(hours=1)).garbage] == [
        "objects/" + "a" * 64 + ".safetensors"
    ]


def test_a_copy_is_whole_takes_only_what_is_missing_and_carries_on_where_it_was_built(
    lab: Any, places: Any
) -> None:
    raw = lab.make_all()
    build(lab, raw)
    source, target = str(lab.folder / "store"), places.make("moto")
    first = copy_build(source, target)
    assert first.num_present == 0
    verify(target).check()
    build(lab, raw | {"mask_scale": 0.9})
    second = copy_build(source + "#tiny", target)
    assert second.num_copied == 5
    assert second.num_present > 5
    assert second.reference.number == 2
    again = copy_build(source + "#tiny", target)
    assert (again.num_copied, again.copied_bytes) == (0, 0)
    assert copy_build(source + "#tiny@1", target, name="other").reference.name == "other"
    back = str(lab.folder / "back")
    copy_build(f"{target}#tiny@1", back)
    verify(back).check()
    report = build(lab, raw | {"output": back})
    assert not report.is_new
    assert report.build == first.build


def test_a_copy_of_a_damaged_build_stops_and_one_that_is_whole_heals_the_target(lab: Any) -> None:
    report = build(lab, lab.make_all())
    source, target = lab.folder / "store", lab.folder / "target"
    assert report.manifest is not None
    key = report.manifest.entries[0].key
    copy_build(str(source), str(target))
    whole = (source / key).read_bytes()
    (target / key).write_bytes(whole[:-1] + b"?")
    copy_build(str(source), str(target), everything=True)
    assert (target / key).read_bytes() == whole
    (source / key).write_bytes(whole[:-1] + b"?")
    with pytest.raises(DamagedObject, match=key):
        copy_build(str(source), str(lab.folder / "other"))
    assert not list((lab.folder / "other").glob("builds/*/manifest.json"))


def test_a_sample_reads_a_share_and_finds_what_it_reads(lab: Any) -> None:
    report = build(lab, lab.make_all())
    place = str(lab.folder / "store")
    seen: list[int] = []
    verify(place, sample=0.2, seed=1, on_bytes=seen.append).check()
    assert report.manifest is not None
    assert 0 < sum(seen) < sum(entry.num_bytes for entry in report.manifest.entries) / 2
    key = report.manifest.entries[0].key
    path = lab.folder / "store" / key
    path.write_bytes(path.read_bytes()[:-1])
    assert any(key in damage for damage in verify(place, sample=0.01).damages), (
        "sizes are compared in any case"
    )
    with pytest.raises(ManifestError, match="share in"):
        verify(place, sample=1.5)


def test_every_command_about_stores_works_from_the_command_line(
    lab: Any, cli: Callable[..., tuple[int, str]]
) -> None:
    raw = lab.make_all()
    recipe, place = str(lab.write_recipe(raw)), str(lab.folder / "store")
    code, text = cli("plan", recipe)
    assert (code, "nothing is in the store yet" in text) == (0, True)
    build(lab, raw)
    build(lab, raw | {"mask_scale": 0.9})
    code, text = cli("plan", str(lab.write_recipe(raw | {"mask_scale": 0.6})), "--json")
    assert code == 0
    assert json.loads(text)["forecast"]["compute"] == 5
    code, text = cli("diff", f"{place}#tiny@1", f"{place}#tiny@2")
    assert code == 0
    assert "mask_scale: 0.75 → 0.9" in text
    assert (
        json.loads(cli("diff", f"{place}#tiny@1", f"{place}#tiny@2", "--json")[1])["objects"]["new"]
        == 5
    )
    code, text = cli("log", place)
    assert code == 0
    assert "tiny@2" in text
    assert [line["number"] for line in json.loads(cli("log", place, "--json")[1])] == [2, 1]
    code, text = cli("gc", place)
    assert code == 0
    assert "would delete 0 objects" in text
    code, text = cli("gc", place, "--delete", "--grace", "0s", "--json")
    assert code == 0
    assert json.loads(text)["deleted"]
    code, text = cli("copy", place, str(lab.folder / "copy"))
    assert code == 0
    assert "copied" in text
    assert "all digests are equal" in cli("verify", str(lab.folder / "copy"))[1]
    assert "a 50.0% sample" in cli("verify", place, "--sample", "0.5")[1]
    code, text = cli("gc", place, "--grace", "soon")
    assert code == 1
    assert "--grace: expected a time like 7d" in text
    assert cli("push", place, "nowhere")[0] == 1


def test_durations_are_read_with_their_unit() -> None:
    assert parse_duration("7d", option="x") == timedelta(days=7)
    assert parse_duration("1.5h", option="x") == timedelta(minutes=90)
    with pytest.raises(RecipeError, match="x: expected"):
        parse_duration("7", option="x")


def test_a_copy_repairs_a_damaged_small_file_of_the_target(lab: Any) -> None:
    """Its size is right, and nothing after the copy would read it before it is needed."""
    run(make_plan(read_recipe(lab.write_recipe(lab.make_all(2)))))
    source, target = lab.folder / "store", lab.folder / "copy"
    copy_build(str(source), str(target))
    path = next(target.glob("files/*"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert verify(str(target)).damages
    report = copy_build(str(source), str(target))
    assert report.repaired == (f"files/{path.name}",)
    assert verify(str(target)).damages == []


def test_a_continued_run_looks_for_objects_of_a_remote_store_concurrently(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = lab.make_all(2) | {"output": "memory://continued"}
    recipe = read_recipe(lab.write_recipe(raw))
    store = open_store("memory://continued", create=True)  # holds the objects of both runs
    run(make_plan(recipe))
    for key in [*store.list("refs"), *store.list("builds")]:
        store.delete(key)
    monkeypatch.setattr(type(store), "is_remote", True)
    find_finished = _Run._find_finished
    threads = set()

    def find(self: Any, task: Any) -> Any:
        threads.add(threading.current_thread())
        return find_finished(self, task)

    monkeypatch.setattr(_Run, "_find_finished", find)
    report = run(make_plan(recipe))
    assert report.num_computed["copy"] == 0
    assert threads
    assert threading.main_thread() not in threads
