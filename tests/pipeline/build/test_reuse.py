"""What a run reuses is what an earlier run stored: objects, entries and scans."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.build import run as run_module
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.tasks.scan_cache import read_scan, scan_key


@pytest.fixture
def plan(lab: Any) -> MergePlan:
    """A plan whose objects, entries and scans are stored, and whose build is not."""
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all(2))))
    run(plan)
    forget_builds(lab.folder / "store")
    return plan


def forget_builds(store: Path) -> None:
    shutil.rmtree(store / "builds")
    shutil.rmtree(store / "refs")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def drop_checksum(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(path.read_bytes())
    del raw["checksum"]
    path.write_text(json.dumps(raw))
    return raw


@pytest.mark.parametrize("damage", ["flipped", "empty", "missing", "longer"])
@pytest.mark.parametrize("is_old", [False, True], ids=["checksum", "version 0.1"])
def test_a_damaged_object_under_a_whole_entry_is_computed_again(
    lab: Any, plan: MergePlan, damage: str, is_old: bool
) -> None:
    objects = sorted((lab.folder / "store" / "objects").glob("*.safetensors"))
    path = objects[3]
    if is_old:
        drop_checksum(path.with_suffix(".json"))
    if damage == "flipped":
        flip(path, -5)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes() + b"?")
    report = run(plan)
    assert report.num_computed["merge"] + report.num_computed["copy"] == 1
    verify(report.uri).check()


@pytest.mark.parametrize("field", ["digest", "statistics", "offset", "name"])
@pytest.mark.parametrize("is_old", [False, True], ids=["checksum", "version 0.1"])
def test_an_entry_that_lies_is_written_again(
    lab: Any, plan: MergePlan, field: str, is_old: bool
) -> None:
    entries = sorted((lab.folder / "store" / "objects").glob("*.json"))
    path = next(path for path in entries if b'"role":"delta"' in path.read_bytes())
    whole = path.read_bytes()
    raw = drop_checksum(path) if is_old else json.loads(whole)
    tensor = raw["tensors"][0]
    if field == "statistics":
        del tensor["statistics"]
    else:
        tensor[field] = {"digest": "0" * 64, "offset": 8, "name": "model.norm2.weight"}[field]
    path.write_text(json.dumps(raw))
    report = run(plan)
    assert path.read_bytes() == whole
    verify(report.uri).check()


def test_a_whole_entry_of_version_0_1_gets_a_checksum_when_it_is_reused(
    lab: Any, plan: MergePlan
) -> None:
    entries = sorted((lab.folder / "store" / "objects").glob("*.json"))
    before = [path.read_bytes() for path in entries]
    for path in entries:
        drop_checksum(path)
    report = run(plan)
    assert report.num_computed["merge"] == report.num_computed["copy"] == 0
    assert [path.read_bytes() for path in entries] == before


def test_verify_reused_reads_what_the_sample_leaves_out(
    lab: Any, plan: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SAMPLE_BYTES", 0)
    path = sorted((lab.folder / "store" / "objects").glob("*.safetensors"))[3]
    flip(path, -5)
    unseen = run(plan)
    assert unseen.num_computed["merge"] == unseen.num_computed["copy"] == 0
    assert verify(unseen.uri).damages
    report = run(plan, verify_reused=True)
    assert report.num_computed["merge"] + report.num_computed["copy"] == 1
    verify(report.uri).check()


@pytest.mark.parametrize("part", ["header", "entry", "file", "table"])
def test_a_run_of_a_stored_build_repairs_its_structure(
    lab: Any, plan: MergePlan, part: str
) -> None:
    report = run(plan)
    folder = lab.folder / "store"
    assert report.manifest is not None
    path = {
        "header": folder / report.manifest.entries[0].key,
        "entry": (folder / report.manifest.entries[0].key).with_suffix(".json"),
        "file": folder / report.manifest.base.files[0].key,
        "table": folder / report.manifest.table.key,
    }[part]
    whole = path.read_bytes()
    if part == "file":
        path.write_bytes(whole[:-1])
    else:
        flip(path, 40)
    run(plan)
    assert path.read_bytes() == whole
    verify(report.uri).check()


def test_a_scan_with_a_flipped_bit_or_of_another_key_is_no_scan(lab: Any, plan: MergePlan) -> None:
    from mmerge.manifests.stores.open import open_store

    store = open_store(str(lab.folder / "store"))
    digests = [Path(key).stem for key in store.list("surveys")]
    generator = random.Random(3)
    for _ in range(50):
        digest = generator.choice(digests)
        data = bytearray(store.read(scan_key(digest)))
        length = 8 + int.from_bytes(data[:8], "little")
        padding = length - len(bytes(data[8:length]).rstrip()) - 8
        bit = generator.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        original = store.read(scan_key(digest))
        store.put(scan_key(digest), bytes(data))
        scan = read_scan(store, digest)
        assert scan is None or length - padding <= bit // 8 < length
        store.put(scan_key(digest), original)
        assert read_scan(store, digest) is not None
    first, second = digests[:2]
    store.put(scan_key(first), store.read(scan_key(second)))
    assert read_scan(store, first) is None
    assert run(plan).num_computed["scan"] == 1
