"""What a store holds is true at every moment: runs that are killed, two builders at once, servers
that fail, bytes that change.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kill_points
import pytest
from store_servers import FAULTS, FaultProxy

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import DamagedObject, MmergeError, StoreUnavailable
from mmerge.manifests.format.manifest import manifest_key, read_manifest
from mmerge.manifests.format.publish import publish_build
from mmerge.manifests.format.references import (
    Reference,
    list_references,
    read_reference,
    write_reference,
)
from mmerge.manifests.format.table import StoredRow, read_table
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.manifests.stores.prefetch import PREFETCH_BYTES
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.build.run import RunReport


def digests(store: Store) -> dict[str, str]:
    """Return every object, file, manifest and table (references hold times, scans hold paths)."""
    kept = ("objects/", "files/", "builds/")
    return {
        key: hashlib.sha256(store.read(key)).hexdigest()
        for key in store.list()
        if key.startswith(kept)
    }


def build(lab: Any, raw: dict[str, Any], output: str) -> RunReport:
    return run(
        make_plan(
            read_recipe(
                lab.write_recipe(
                    raw | {"output": output},
                    f"{hashlib.sha1(output.encode()).hexdigest()[:8]}.yaml",
                )
            )
        )
    )


def test_a_run_killed_at_50_random_points_leaves_only_what_verifies_and_ends_with_the_same_digests(
    lab: Any,
) -> None:
    num_points = 50
    raw = lab.make_all()
    undisturbed = str(lab.write_recipe(raw | {"output": "undisturbed"}, "undisturbed.yaml"))
    num_waits = kill_points.count_waits(undisturbed)
    assert num_waits > 40
    expected = digests(open_store(str(lab.folder / "undisturbed")))
    chance = random.Random(7)
    num_killed = num_stores = 0
    while num_killed < num_points:
        num_stores += 1
        place = str(lab.folder / f"killed{num_stores}")
        recipe = str(lab.write_recipe(raw | {"output": place}, "killed.yaml"))
        store, left, code = open_store(place, create=True), num_waits, -9
        while code == -9 and num_killed < num_points:
            kill_at = chance.randint(1, max(2, left))
            code, left = kill_points.run_until(recipe, kill_at), left - kill_at
            num_killed += code == -9
            for manifest in [key for key in store.list("builds") if key.endswith("/manifest.json")]:
                verify(f"{place}#{manifest.split('/')[1]}").check()
        assert code == 0 or kill_points.run_until(recipe, 0) == 0
        assert digests(store) == expected
        verify(place).check()


@pytest.mark.parametrize("kind", ["local", "moto", "racy", "swift"])
def test_two_builders_at_once_both_end_well_with_one_build(
    lab: Any,
    places: Any,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = lab.make_all(2)
    place = places.make("moto" if kind == "racy" else kind)
    with (
        FaultProxy(places.endpoint("moto"), racy_create=True)
        if kind == "racy"
        else ThreadPoolExecutor() as proxy
    ):
        if isinstance(proxy, FaultProxy):
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        plan = make_plan(read_recipe(lab.write_recipe(raw | {"output": place})))
        with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING, logger="mmerge.store"):
            one, other = pool.map(lambda _: run(plan), range(2))
        store = open_store(place)
        assert one.build == other.build
        assert one.manifest == other.manifest
        assert {key.split("/")[1] for key in store.list("builds")} == {one.build}
        references = list_references(store)["tiny"]
        assert {read_reference(store, "tiny", number).build for number in references} == {one.build}
        verify(place).check()
        assert any(
            "lets several writers create" in record.message for record in caplog.records
        ) == (kind in ("racy", "swift"))
    undisturbed = build(lab, raw, "undisturbed")
    assert undisturbed.manifest == one.manifest


def test_concurrent_writers_on_a_server_with_racy_create_end_with_the_same_build(
    lab: Any, places: Any
) -> None:
    """Many committers at once against Swift, again and again until it let several of them create
    the manifest.
    """
    report = build(lab, lab.make_all(1), "source")
    manifest = report.manifest
    assert manifest is not None
    table = open_store(str(lab.folder / "source")).read(manifest.table.key)
    place = places.make("swift")
    copy_build(str(lab.folder / "source"), place)

    def commit(name: str) -> tuple[bool, Reference]:
        store = open_store(place)
        return publish_build(store, manifest, table).is_new, write_reference(
            store, name, report.build, sources={}, versions={}
        )[0]

    num_double = 0
    for number in range(40):
        open_store(place).delete(manifest_key(report.build))
        with ThreadPoolExecutor(8) as pool:
            ends = list(pool.map(commit, [f"name{number}"] * 8))
        num_double += sum(is_new for is_new, _ in ends) > 1
        assert {reference.build for _, reference in ends} == {report.build}
        store = open_store(place)
        assert read_manifest(store, report.build) == manifest
        assert {
            read_reference(store, f"name{number}", each).build
            for each in list_references(store)[f"name{number}"]
        } == {report.build}
        if num_double >= 3:
            break
    assert num_double >= 3, "Swift let no two writers create: this test saw nothing"
    verify(f"{place}#name0").check()


def test_a_build_ends_right_though_requests_fail_break_off_and_stall(
    lab: Any, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = lab.make_all(2)
    undisturbed = build(lab, raw, "undisturbed")
    place = places.make("moto")
    with FaultProxy(places.endpoint("moto"), share=0.05, stall_seconds=10, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "2")
        report = build(lab, raw, place)
        verify(place).check()
    assert sum(count for fault, count in proxy.counts.items() if fault != "none") >= 5
    assert report.build == undisturbed.build
    monkeypatch.setenv("AWS_ENDPOINT_URL", places.endpoint("moto"))
    assert digests(open_store(place)) == digests(open_store(str(lab.folder / "undisturbed")))


def test_a_large_range_arrives_whole_though_its_parts_fail_break_off_and_stall(
    places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(1).randbytes(40 << 20)
    place = places.make("moto")
    open_store(place).put("large", data)
    seen: set[str] = set()
    monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "2")
    for fault in FAULTS:
        with FaultProxy(
            places.endpoint("moto"), share=0.3, faults=(fault,), stall_seconds=10, seed=2
        ) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            told: list[memoryview] = []
            assert (
                open_store(place).read_range(
                    "large", offset=7, num_bytes=len(data) - 9, on_part=told.append
                )
                == data[7:-2]
            )
            assert b"".join(told) == data[7:-2]
        seen |= set(proxy.counts)
    assert seen == {"none", *FAULTS}, "a fault was not met"


@pytest.mark.parametrize("fault", ["500", "reset", "stall"])
def test_a_store_that_always_fails_ends_with_one_error_in_bounded_time(
    lab: Any, places: Any, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    place = places.make("moto")
    raw = lab.make_all(2)
    with FaultProxy(places.endpoint("moto"), share=1.0, faults=(fault,), stall_seconds=10) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "0.5")
        monkeypatch.setenv("MMERGE_RETRY_TIMEOUT", "2")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            build(lab, raw, place)
        assert time.monotonic() - began < 20
    message = str(caught.value)
    assert "cannot be written" in message
    assert "Choose another 'output' or grant write access" in message
    assert "\n" not in message


def test_inputs_are_read_from_the_same_stores_as_outputs(lab: Any, places: Any) -> None:
    raw = lab.make_all(2)
    local = build(lab, raw, "local")
    local_plan = make_plan(read_recipe(lab.write_recipe(raw)))
    place = places.make("moto")
    store = open_store(place)
    for name in ("base", "image", "audio"):
        for path in (lab.folder / name).iterdir():
            store.put(f"{name}/{path.name}", path.read_bytes())
    experts = {name: {"path": f"{place}/{name}", "modality": name} for name in ("image", "audio")}
    raw |= {"base": f"{place}/base", "experts": experts}
    remote = build(lab, raw, f"{place}/composites")
    assert remote.manifest == local.manifest
    remote_plan = make_plan(read_recipe(lab.write_recipe(raw)))
    assert remote_plan.peak_bytes - local_plan.peak_bytes == 3 * PREFETCH_BYTES, (
        "what is read ahead is stated"
    )
    assert b"AK" not in store.read(f"composites/builds/{remote.build}/manifest.json")


@pytest.fixture
def built(lab: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[StoredRow]]:
    """A small build, with a loader that reads every tensor; models and tokenizers of three layers
    are not the matter here.
    """
    from mmerge.workers.composite import loader as load
    from mmerge.workers.modalities import encoders

    report = build(lab, lab.make_all(2), "store")
    monkeypatch.setattr(load, "load_tokenizer", lambda files, config, owner: None)
    monkeypatch.setattr(encoders, "MediaEncoder", lambda **parts: "an encoder")
    assert report.manifest is not None
    return lab.folder / "store", read_table(
        open_store(str(lab.folder / "store")), report.manifest.table
    )


def load(folder: Path) -> None:
    """Load the composite in every mode; each reads only what it needs, together they read every
    tensor.
    """
    from mmerge.pipeline import load_composite

    load_composite(str(folder))
    for expert in ("image", "audio"):
        load_composite(str(folder), mode="retention", expert=expert)


def test_every_changed_byte_of_a_tensor_is_found_and_named_by_verify_and_by_the_loader(
    built: tuple[Path, list[StoredRow]],
) -> None:
    folder, rows = built
    load(folder)
    chance = random.Random(5)
    tried = {row.role: row for row in chance.sample(rows, len(rows))}
    assert set(tried) == {"base", "delta", "mask", "carried", "extra_rows"}
    for row in [*tried.values(), *chance.sample(rows, 8)]:
        path = folder / row.object
        whole = path.read_bytes()
        at = row.offset + chance.randrange(row.num_bytes)
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :]
        )
        (damage,) = verify(str(folder)).damages
        assert row.object in damage
        assert row.name in damage
        assert f"bytes {row.offset} to {row.offset + row.num_bytes}" in damage
        with pytest.raises(DamagedObject) as caught:
            load(folder)
        assert row.object in str(caught.value)
        assert row.name in str(caught.value)
        path.write_bytes(whole)
    load(folder)


def test_every_changed_byte_of_a_header_is_found_and_named_by_verify_and_by_the_loader(
    built: tuple[Path, list[StoredRow]],
) -> None:
    """Length, JSON, metadata and padding: in each object at its first and last bytes and at random
    ones, one bit each.
    """
    folder, rows = built
    chance = random.Random(8)
    tried = 0
    for key in sorted({row.object for row in rows}):
        path = folder / key
        whole = path.read_bytes()
        num_bytes = min(row.offset for row in rows if row.object == key)
        assert num_bytes == 8 + int.from_bytes(whole[:8], "little")
        named_by = {
            whole.index(f'"{row.name}'.encode()): row.name
            for row in rows
            if row.object == key and row.role != "mask"
        }
        padding = [at for at in range(8, num_bytes) if not whole[at:num_bytes].strip(b" ")]
        for at in {0, 7, 8, num_bytes - 1, *padding[:1], *named_by, chance.randrange(8, num_bytes)}:
            changed = bytearray(whole)
            changed[at] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            check_damage(folder, [key], rows)
            if at in named_by:
                assert named_by[at] in verify(str(folder)).damages[0]
                assert any(key in damage for damage in verify(str(folder), sample=0.01).damages), (
                    "a sample compares headers"
                )
            tried += 1
        path.write_bytes(whole)
    assert tried > 60
    load(folder)


def test_objects_with_equal_bytes_but_for_their_headers_cannot_be_swapped(
    built: tuple[Path, list[StoredRow]],
) -> None:
    folder, rows = built
    row = next(row for row in rows if row.role == "carried")
    path = folder / row.object
    whole = path.read_bytes()
    other = digest_bytes(b"another object").encode()
    path.write_bytes(whole.replace(Path(row.object).stem.encode(), other, 1))
    check_damage(folder, [row.object], rows)
    path.write_bytes(whole + b"?")
    check_damage(folder, [row.object], rows)


def test_every_truncation_and_swap_is_found_and_named_by_verify_and_by_the_loader(
    built: tuple[Path, list[StoredRow]],
) -> None:
    folder, rows = built
    objects = sorted({row.object for row in rows})
    chance = random.Random(6)
    for key in chance.sample(objects, 5):
        path = folder / key
        whole = path.read_bytes()
        path.write_bytes(whole[: chance.randrange(len(whole))])
        check_damage(folder, [key], rows)
        path.unlink()
        check_damage(folder, [key], rows)
        path.write_bytes(whole)
    for one, other in (chance.sample(objects, 2) for _ in range(4)):
        before = {key: (folder / key).read_bytes() for key in (one, other)}
        (folder / one).write_bytes(before[other])
        (folder / other).write_bytes(before[one])
        check_damage(folder, [one, other], rows)
        for key, whole in before.items():
            (folder / key).write_bytes(whole)
    load(folder)


def check_damage(folder: Path, keys: list[str], rows: list[StoredRow]) -> None:
    damages = verify(str(folder)).damages
    for key in keys:
        found = [damage for damage in damages if key in damage]
        assert found
        assert any(row.name in found[0] for row in rows if row.object == key)
    with pytest.raises(MmergeError) as caught:
        load(folder)
    assert any(key in str(caught.value) for key in keys)
    assert any(row.name in str(caught.value) for row in rows if row.object in keys)
