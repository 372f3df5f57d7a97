"""A number of a name keeps its meaning for ever: after deletion, and with writers held up."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from lost_answers import lose_answers

from mmerge.manifests.errors import (
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from mmerge.manifests.format.references import (
    delete_reference,
    deletion_mark_key,
    find_build,
    list_reference_numbers,
    list_references,
    read_reference,
    reference_key,
    write_reference,
)
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.stores import confirm
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store

BUILDS = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
FACTS: dict[str, dict[str, str]] = {"sources": {}, "versions": {}}


@pytest.fixture(params=["memory", "local", "moto"])
def store(request: pytest.FixtureRequest, places: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(confirm, "PAUSE_SECONDS", 0.0)
    return open_store(places.make(request.param), create=True)


def refer(store: Store, build: str) -> int:
    return write_reference(store, "omni", build, **FACTS)[0].number


def before_next_create(
    store: Store, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> None:
    """Call `act` once, when the store is about to create an object."""
    put_new = store.put_new

    def held_up(key: str, data: bytes) -> None:
        monkeypatch.setattr(store, "put_new", put_new)
        act()
        put_new(key, data)

    monkeypatch.setattr(store, "put_new", held_up)


def test_a_writer_that_slept_while_its_number_was_used_and_deleted_takes_a_new_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])

    def use_and_delete() -> None:
        assert [refer(store, build) for build in BUILDS[1:3]] == [2, 3]
        for number in (1, 2):
            delete_reference(store, "omni", number)

    before_next_create(store, monkeypatch, use_and_delete)
    assert refer(store, BUILDS[3]) == 4
    assert list_references(store) == {"omni": [3, 4]}
    assert read_reference(store, "omni", 3).build == BUILDS[2]
    with pytest.raises(NotFound, match="omni@2 was deleted"):
        read_reference(store, "omni", 2)


def test_a_number_that_such_a_writer_has_just_created_is_no_number_to_any_reader(
    store: Store,
) -> None:
    for build in BUILDS[:2]:
        refer(store, build)
    delete_reference(store, "omni", 2)
    store.put_new(reference_key("omni", 2), store.read(reference_key("omni", 1)))
    assert list_references(store) == {"omni": [1]}
    with pytest.raises(NotFound, match="omni@2 was deleted"):
        read_reference(store, "omni", 2)
    with pytest.raises(ManifestError, match="omni@2 was deleted; omni has 1"):
        find_build(store, "omni@2")


def test_the_next_number_is_above_every_number_that_was_ever_used(store: Store) -> None:
    for build in BUILDS[:3]:
        refer(store, build)
    for number in (3, 1, 2):
        delete_reference(store, "omni", number)
        delete_reference(store, "omni", number)
    assert list_references(store) == {}
    assert list_reference_numbers(store, "omni")["omni"].deleted == {1, 2, 3}
    assert refer(store, BUILDS[3]) == 4
    assert find_build(store, "omni") == BUILDS[3]


def test_a_number_that_never_was_cannot_be_deleted(store: Store) -> None:
    refer(store, BUILDS[0])
    with pytest.raises(NotFound, match="omni has no number 7"):
        delete_reference(store, "omni", 7)
    assert refer(store, BUILDS[1]) == 2


def test_a_collection_marks_what_it_deletes_and_keeps_the_marks(
    store: Store,
) -> None:
    for build in BUILDS[:3]:
        refer(store, build)
    if store.is_remote:
        time.sleep(1.1)  # times of the server are whole seconds
    for _ in range(2):
        collect_garbage(store, grace=timedelta(0), keep=1, delete=True)
    assert sorted(store.list("refs")) == [
        deletion_mark_key("omni", 1),
        deletion_mark_key("omni", 2),
        reference_key("omni", 3),
    ]


def test_a_number_stays_where_its_mark_cannot_be_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])
    monkeypatch.setattr(store, "put", lambda key, data: None)
    with pytest.raises(StoreUnavailable, match=r"000001\.deleted: .* stored nothing"):
        delete_reference(store, "omni", 1)
    assert list_references(store) == {"omni": [1]}


def test_a_reference_whose_answer_was_lost_is_this_writers_own(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_answers(store, monkeypatch)
    reference, is_new = write_reference(store, "omni", BUILDS[0], **FACTS)
    assert (reference.number, is_new) == (1, True)


def test_a_reference_that_was_changed_on_its_way_is_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_new = store.put_new
    num_creates = 0

    def change_first(key: str, data: bytes) -> None:
        nonlocal num_creates
        num_creates += 1
        put_new(key, data.replace(b"a" * 64, b"e" * 64) if num_creates == 1 else data)

    monkeypatch.setattr(store, "put_new", change_first)
    assert refer(store, BUILDS[0]) == 1
    assert read_reference(store, "omni", 1).build == BUILDS[0]


def test_a_store_that_keeps_no_reference_ends_in_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "put_new", lambda key, data: None)
    with pytest.raises(StoreUnavailable, match=r"refs/omni/000001\.json: .* stored nothing"):
        refer(store, BUILDS[0])


def test_a_reference_under_another_key_is_damaged(store: Store) -> None:
    refer(store, BUILDS[0])
    store.put(reference_key("omni", 5), store.read(reference_key("omni", 1)))
    with pytest.raises(ManifestError, match="says that it is omni@1"):
        read_reference(store, "omni", 5)


def before_each_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, key: str, acts: list[Callable[[], object]]
) -> None:
    """Call the first of `acts` that is left when the store is about to read an object."""
    read = store.read

    def held_up(read_key: str, **options: Any) -> bytes:
        if read_key == key and acts:
            acts.pop(0)()
        return read(read_key, **options)

    monkeypatch.setattr(store, "read", held_up)


def test_a_writer_lists_again_when_the_latest_number_is_deleted_before_it_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])
    refer(store, BUILDS[1])
    key = reference_key("omni", 2)
    before_each_read(store, monkeypatch, key, [lambda: delete_reference(store, "omni", 2)])
    assert refer(store, BUILDS[2]) == 3


def test_a_reader_of_the_latest_number_gets_the_one_before_when_that_is_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])
    refer(store, BUILDS[1])
    key = reference_key("omni", 2)
    before_each_read(store, monkeypatch, key, [lambda: delete_reference(store, "omni", 2)])
    assert find_build(store, "omni") == BUILDS[0]


def test_a_collection_spares_the_number_that_is_the_newest_after_a_deletion(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])
    refer(store, BUILDS[1])
    time.sleep(0.01)
    key = reference_key("omni", 2)
    before_each_read(store, monkeypatch, key, [lambda: delete_reference(store, "omni", 2)])
    report = collect_garbage(store, grace=timedelta(0))
    assert report.live_builds == (BUILDS[0],)
    assert reference_key("omni", 1) not in {listed.key for listed in report.garbage}


def test_a_reference_that_vanishes_without_a_mark_is_reported_with_a_remedy(store: Store) -> None:
    with pytest.raises(NotFound, match=r"omni@1 is not there.*'mmerge log .*#omni'"):
        read_reference(store, "omni", 1)


def test_a_collection_that_finds_no_reference_it_lists_says_what_to_do(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refer(store, BUILDS[0])
    read = store.read

    def read_nothing(key: str, **options: Any) -> bytes:
        if key.startswith("refs/"):
            raise NotFound(key)
        return read(key, **options)

    monkeypatch.setattr(store, "read", read_nothing)
    with pytest.raises(StoreError, match=r"nothing was deleted here\. Try again"):
        collect_garbage(store)
