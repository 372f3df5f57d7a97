"""Commits and collections of processes that were suspended for longer than their leases live."""

from __future__ import annotations

from datetime import timedelta

import pytest
from clocked_store import ClockedStore, once

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import ManifestError, MissingObjects, StoreError
from mmerge.manifests.format.entry import ObjectEntry
from mmerge.manifests.format.manifest import (
    BaseRecord,
    FileEntry,
    Manifest,
    manifest_key,
    needed_keys,
)
from mmerge.manifests.format.publish import make_table_entry
from mmerge.manifests.format.references import list_references
from mmerge.manifests.format.table import make_table
from mmerge.manifests.maintenance import manifest_checks
from mmerge.manifests.maintenance.delete_build import delete_build
from mmerge.manifests.maintenance.fenced_commit import FencedCommit, manifest_sizes
from mmerge.manifests.maintenance.garbage_collection import GarbageReport, collect_garbage
from mmerge.manifests.maintenance.lease import STALE, Claims, Lease, Timing

BUILD = "a" * 64
KEYS = [f"objects/{digit * 64}.safetensors" for digit in "123"]
LONG = STALE.total_seconds() / 60 + 5
"""Minutes after which every lease is stale."""
NO_GRACE = timedelta(0)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> ClockedStore:
    # The build of these tests has objects of three bytes, and its digest is not of its records.
    monkeypatch.setattr(manifest_checks, "find_manifest_damages", lambda manifest: [])
    return ClockedStore()


TABLE = make_table([])


def make_manifest() -> Manifest:
    files = (FileEntry(name="config.json", num_bytes=2, digest=digest_bytes(b"{}")),)
    return Manifest(
        build=BUILD,
        kind="plain",
        method="ties",
        parameters={},
        merge="all",
        dtype="BF16",
        base=BaseRecord(revision="r", files=files),
        experts=(),
        entries=tuple(
            ObjectEntry(key=key, shard=key, role="merge", num_bytes=3, digest="0" * 64)
            for key in KEYS
        ),
        table=make_table_entry(BUILD, TABLE),
    )


def work(store: ClockedStore) -> None:
    """Write what a run writes before it commits."""
    for key in KEYS:
        store.put(key, b"123")
        store.put(key.replace(".safetensors", ".json"), b"{}")
    for file in make_manifest().unique_files():
        store.put(file.key, b"{}")


def commit(lease: Lease) -> None:
    manifest = make_manifest()
    FencedCommit(lease, manifest).publish(TABLE)
    FencedCommit(lease, manifest).write_reference("omni", sources={}, versions={})


def collect(store: ClockedStore, timing: Timing | None = None) -> GarbageReport:
    return collect_garbage(store, grace=NO_GRACE, delete=True, timing=timing or store.timing())


def find_dangling(store: ClockedStore) -> list[str]:
    """Return what the committed build names and the store lacks."""
    if not list_references(store) and not store.exists(manifest_key(BUILD)):
        return []
    keys = [manifest_key(BUILD), *manifest_sizes(make_manifest())]
    return [key for key in keys if not store.exists(key)]


def sleep_and_collect(store: ClockedStore, *, minutes: float = LONG) -> None:
    store.advance(minutes=minutes)
    collect(store)


def test_a_run_that_slept_at_work_commits_nothing_that_a_collection_has_deleted(
    store: ClockedStore,
) -> None:
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        sleep_and_collect(store)
        with pytest.raises(MissingObjects, match=KEYS[0]) as caught:
            commit(lease)
        assert set(KEYS) <= set(caught.value.keys)
        assert not list(store.list("builds"))
        assert not list_references(store)
        work(store)
        commit(lease)
    assert find_dangling(store) == []
    assert list_references(store) == {"omni": [1]}


def test_a_run_commits_nothing_after_a_collection_that_ended_between_entry_and_object(
    store: ClockedStore,
) -> None:
    """Both were suspended: the collection first, and the run fenced it before it ended."""
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        store.delete(KEYS[0].replace(".safetensors", ".json"))
        with pytest.raises(MissingObjects, match=KEYS[0].replace(".safetensors", ".json")):
            commit(lease)
    assert not list_references(store)


@pytest.mark.parametrize("prefix", ["builds/", "refs/"])
@pytest.mark.parametrize("minutes", [LONG, 23 * 60])
def test_a_run_that_slept_between_its_last_check_and_the_create_loses_nothing(
    store: ClockedStore, prefix: str, minutes: float
) -> None:
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        store.advance(minutes=1)
        once(store, "put_new", prefix, lambda: sleep_and_collect(store, minutes=minutes))
        commit(lease)
    assert find_dangling(store) == []
    assert list_references(store) == {"omni": [1]}


def test_a_run_that_slept_for_days_between_manifest_and_reference_names_no_broken_build(
    store: ClockedStore,
) -> None:
    manifest = make_manifest()
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        FencedCommit(lease, manifest).publish(TABLE)
        sleep_and_collect(store, minutes=3 * 24 * 60)
        with pytest.raises(MissingObjects, match=r"manifest\.json"):
            FencedCommit(lease, manifest).write_reference("omni", sources={}, versions={})
    assert not list_references(store)


def test_a_check_that_is_minutes_old_is_made_again(store: ClockedStore) -> None:
    announcements: list[str] = []

    def watch(verb: str, key: str) -> None:
        if verb == "put" and key.startswith("claims/commit-"):
            announcements.append(key)
        if verb == "num_bytes" and key == KEYS[-1] and len(announcements) == 1:
            store.advance(minutes=6)

    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        store.on_call = watch
        FencedCommit(lease, make_manifest()).publish(TABLE)
    assert len(announcements) == 2
    assert not list(store.list("claims")), "lease and announcement stayed"


def test_an_object_of_another_size_is_missing(store: ClockedStore) -> None:
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        store.put(KEYS[1], b"12")
        with pytest.raises(MissingObjects, match=f"{KEYS[1]}: missing, or of another size"):
            commit(lease)


def run_beside(store: ClockedStore) -> None:
    """Let a run commit a build of objects that lie in the store."""
    with Lease(store, "run", timing=store.timing()) as lease:
        lease.wait_for_none("collect")
        commit(lease)


def prepare_collection(store: ClockedStore, act: object, *, listing: int) -> None:
    """Call `act` after the collection has listed the whole store for the n-th time."""
    num_listings = 0

    def watch(verb: str, key: str) -> None:
        nonlocal num_listings
        num_listings += verb == "list" and not key
        if num_listings == listing:
            store.on_call = lambda verb, key: None
            act()  # type: ignore[operator]

    work(store)
    store.advance(minutes=1)
    store.on_call = watch


@pytest.mark.parametrize("is_clock_stopped", [False, True])
@pytest.mark.parametrize("listing", [1, 2])
def test_a_collection_that_slept_after_it_marked_deletes_nothing_of_a_later_build(
    store: ClockedStore, is_clock_stopped: bool, listing: int
) -> None:
    def sleep_and_run() -> None:
        store.advance(minutes=LONG)
        run_beside(store)

    timing = store.timing(is_clock_stopped=is_clock_stopped)
    prepare_collection(store, sleep_and_run, listing=listing)
    if listing == 2:
        with pytest.raises(StoreError, match="took this process for dead"):
            collect(store, timing)
    else:
        assert not collect(store, timing).garbage
    assert find_dangling(store) == []
    assert list_references(store) == {"omni": [1]}


def test_a_collection_that_slept_among_its_deletes_ends(store: ClockedStore) -> None:
    work(store)
    store.advance(minutes=1)
    once(store, "delete", KEYS[0], lambda: store.advance(minutes=LONG))
    with pytest.raises(StoreError, match=r"was suspended.*3 of 7 objects were deleted"):
        collect(store)
    assert store.exists(KEYS[1])


def test_a_collection_ends_if_a_run_has_come_while_it_marked(store: ClockedStore) -> None:
    lease = Lease(store, "run", timing=store.timing())
    prepare_collection(store, lease.renew, listing=1)
    with pytest.raises(StoreError, match="in use by another process"):
        collect(store)
    assert all(map(store.exists, KEYS))


def test_a_collection_spares_what_was_written_again_while_it_marked(store: ClockedStore) -> None:
    def write_again() -> None:
        store.advance(minutes=1)
        store.put(KEYS[0], b"123")
        store.advance(minutes=1)

    prepare_collection(store, write_again, listing=1)
    report = collect(store)
    assert KEYS[0] not in {listed.key for listed in report.garbage}
    assert store.exists(KEYS[0])
    assert not store.exists(KEYS[1])


def test_announced_keys_are_live_for_a_day_and_no_longer(store: ClockedStore) -> None:
    work(store)
    lease = Lease(store, "run", timing=store.timing())
    lease.announce(needed_keys(make_manifest()))
    store.advance(minutes=23 * 60)
    collect(store)
    assert all(map(store.exists, KEYS))
    store.advance(minutes=2 * 60)
    collect(store)
    assert not any(map(store.exists, KEYS))
    assert not list(store.list("claims"))


def test_a_damaged_announcement_stops_a_collection(store: ClockedStore) -> None:
    work(store)
    store.put("claims/commit-x.json", b"{")
    store.advance(minutes=1)
    with pytest.raises(
        StoreError, match=r"claims/commit-x\.json is damaged .* nothing was deleted"
    ):
        collect(store)
    assert all(map(store.exists, KEYS))


def test_a_build_is_not_deleted_while_a_run_is_about_to_commit_it(store: ClockedStore) -> None:
    with Lease(store, "run", timing=store.timing()) as lease:
        work(store)
        commit(lease)
    killed = Lease(store, "run", timing=store.timing())
    killed.announce(needed_keys(make_manifest()))
    store.advance(minutes=LONG)
    with pytest.raises(StoreError, match="a run was about to commit: nothing was deleted"):
        delete_build(store, "omni", objects=True, delete=True)
    assert find_dangling(store) == []


def test_the_age_of_a_lease_is_by_the_own_lease_not_by_one_in_the_future(
    store: ClockedStore,
) -> None:
    store.advance(minutes=60)
    store.put("claims/run-future.json", b"{}")
    store.seconds = 0
    store.put("claims/run-live.json", b"{}")
    with Lease(store, "collect", timing=store.timing()) as lease:
        assert lease.find_others("run") == ["claims/run-future.json", "claims/run-live.json"]
    store.advance(minutes=LONG)
    with Lease(store, "collect", timing=store.timing()) as lease:
        assert lease.find_others("run") == ["claims/run-future.json"]


def test_a_listing_that_lacks_the_own_lease_stops_a_collection_and_warns_a_run(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work(store)
    store.advance(minutes=1)
    list_objects = store.list_objects
    monkeypatch.setattr(
        store,
        "list_objects",
        lambda prefix="": iter(()) if prefix == "claims" else list_objects(prefix),
    )
    with pytest.raises(StoreError, match="listing does not show"):
        collect(store)
    assert all(map(store.exists, KEYS))
    with Lease(store, "run", timing=store.timing()) as lease:
        assert isinstance(lease.read_claims(), Claims)
    assert "do not run 'mmerge gc' there" in caplog.text


def test_a_run_ends_where_every_listing_is_empty(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library makes one of the page of a captive portal."""
    monkeypatch.setattr(store, "list_objects", lambda prefix="": iter(()))
    with (
        Lease(store, "run", timing=store.timing()) as lease,
        pytest.raises(StoreError, match="what answers is no object storage"),
    ):
        lease.wait_for_none("collect")


@pytest.mark.parametrize("is_clock_stopped", [False, True])
def test_a_collection_that_slept_between_two_deletes_deletes_nothing_more(
    store: ClockedStore, is_clock_stopped: bool
) -> None:
    """A run takes the objects that are left; with a clock that stood still, its fence says so."""
    work(store)
    store.advance(minutes=1)

    def sleep_while_a_run_commits() -> None:
        store.advance(minutes=LONG)
        with Lease(store, "run", timing=store.timing()) as lease:
            lease.wait_for_none("collect")
            work(store)
            commit(lease)

    # After a delete: what the next check sees is then from before the run only if there is none.
    delete = store.delete

    def delete_and_sleep(key: str) -> None:
        delete(key)
        if key == KEYS[0]:
            store.delete = delete  # type: ignore[method-assign]
            sleep_while_a_run_commits()

    store.delete = delete_and_sleep  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=r"took this process for dead|was suspended"):
        collect(store, timing=store.timing(is_clock_stopped=is_clock_stopped))
    assert find_dangling(store) == []
    assert list_references(store) == {"omni": [1]}


def test_a_run_that_waits_too_long_names_the_lease(store: ClockedStore) -> None:
    with (
        Lease(store, "collect", timing=store.timing()) as collection,
        Lease(store, "run", timing=store.timing()) as lease,
        pytest.raises(StoreError, match=f"{collection.key} is held by another process"),
    ):
        lease.wait_for_none("collect", seconds=60)


def test_an_error_of_missing_objects_survives_a_worker_process() -> None:
    import pickle

    error = MissingObjects("store", KEYS)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ManifestError)
    assert (str(copy), copy.keys) == (str(error), KEYS)
