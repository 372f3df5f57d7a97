"""Faults put back into the product, to show that the models find them.

Each mutation replaces one thing for the time of a context. Names are looked up when a mutation is
used, so that a renamed one fails its test instead of changing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import mmerge.manifests.format.publish as publish_module
import mmerge.manifests.format.references as references_module
import mmerge.manifests.maintenance.check_build as check_build_module
import mmerge.manifests.maintenance.deletion as deletion_module
import mmerge.manifests.maintenance.fenced_commit as fenced_commit_module
import mmerge.manifests.maintenance.garbage_collection as gc_module
import mmerge.manifests.maintenance.verify as verify_module
import mmerge.manifests.stores.confirm as confirm_module
import mmerge.manifests.stores.error_translation as translation_module
import mmerge.pipeline.monitoring.run_records as run_records_module
from mmerge.manifests.errors import AlreadyExists
from mmerge.manifests.maintenance.fenced_commit import FencedCommit
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.confirm import Stored
from mmerge.manifests.stores.object_store import ObjectStore
from mmerge.workers.checkpoints.input_digests import PieceDigests

Mutation = Callable[[], AbstractContextManager[Any]]


@contextmanager
def reuse_deleted_numbers() -> Iterator[None]:
    """A deleted reference leaves no mark, so that a late writer takes its number again."""

    def delete(store: Any, name: str, number: int, **options: Any) -> None:
        store.delete(references_module.reference_key(name, number))

    with mock.patch.object(deletion_module, "delete_reference", delete):
        yield


@contextmanager
def replace_builds() -> Iterator[None]:
    """A second builder puts its own table and manifest over the published ones."""

    def publish(store: Any, manifest: Any, table: bytes, **options: Any) -> Any:
        store.put(manifest.table.key, table)
        store.put(
            publish_module.manifest_key(manifest.build), publish_module.to_manifest_bytes(manifest)
        )
        return publish_module.Publication(manifest, is_new=True)

    with mock.patch.object(fenced_commit_module, "publish_build", publish):
        yield


@contextmanager
def trust_writes() -> Iterator[None]:
    """Nothing that was put is read back."""

    def create(store: Any, key: str, data: bytes, **options: Any) -> Stored:
        try:
            store.put_new(key, data)
        except AlreadyExists:
            return Stored(store.read(key), False)
        return Stored(data, True)

    def put(store: Any, key: str, data: bytes, **options: Any) -> None:
        store.put(key, data)

    with (
        mock.patch.object(confirm_module, "create", create),
        mock.patch.object(confirm_module, "put", put),
    ):
        yield


@contextmanager
def trust_uploads() -> Iterator[None]:
    """The object store does not ask what the server holds after an upload."""
    with mock.patch.object(ObjectStore, "confirm_upload", return_value=None):
        yield


@contextmanager
def skip_record_checks() -> Iterator[None]:
    """Manifest, table and entries are not held against each other."""
    with (
        mock.patch.object(check_build_module, "find_record_damages", return_value=[]),
        mock.patch.object(check_build_module, "find_stored_damages", return_value=[]),
        mock.patch.object(check_build_module, "find_reference_damages", return_value=[]),
        mock.patch.object(verify_module, "find_reference_damages", return_value=[]),
    ):
        yield


@contextmanager
def commit_without_fence() -> Iterator[None]:
    """A run announces nothing and checks nothing before it commits."""
    with (
        mock.patch.object(FencedCommit, "_confirm", return_value=None),
        mock.patch.object(FencedCommit, "_check_time", return_value=None),
    ):
        yield


@contextmanager
def forget_shared_objects() -> Iterator[None]:
    """A collection spares the manifest and the table of a live build, and not its objects."""
    needed_keys = gc_module.needed_keys

    def find(manifest: Any) -> set[str]:
        return {key for key in needed_keys(manifest) if key.startswith("builds/")}

    with mock.patch.object(gc_module, "needed_keys", find):
        yield


@contextmanager
def commit_without_entries() -> Iterator[None]:
    """A run checks that its objects are there before it commits, and not their entries."""
    real_sizes = fenced_commit_module.manifest_sizes

    def find(manifest: Any) -> dict[str, int | None]:
        sizes = real_sizes(manifest)
        return {key: sizes[key] for key in sizes if not key.endswith(".json")}

    with mock.patch.object(fenced_commit_module, "manifest_sizes", find):
        yield


@contextmanager
def never_lapse_in_commit() -> Iterator[None]:
    """However long ago a run checked its objects, it commits."""
    with mock.patch.object(FencedCommit, "_check_time", return_value=None):
        yield


@contextmanager
def never_lapse_in_collection() -> Iterator[None]:
    """A collection that was suspended goes on deleting, unless a run has fenced it."""
    with mock.patch.object(Lease, "has_lapsed", return_value=False):
        yield


@contextmanager
def ignore_fences() -> Iterator[None]:
    """A collection looks for no fence, and goes on while its own clock shows no suspension."""
    with mock.patch.object(deletion_module, "_check_fence", return_value=None):
        yield


@contextmanager
def ignore_lapse_and_fences() -> Iterator[None]:
    """A collection that was suspended goes on, whoever took it for dead."""
    with never_lapse_in_collection(), ignore_fences():
        yield


@contextmanager
def mark_once() -> Iterator[None]:
    """A collection deletes what it marked before it looked for leases a second time."""
    real_mark = gc_module._mark

    def mark(lease: Any, **options: Any) -> Any:
        if not hasattr(lease, "first_report"):
            lease.first_report = real_mark(lease, **options)
        return lease.first_report

    with mock.patch.object(gc_module, "_mark", mark):
        yield


@contextmanager
def trust_inputs() -> Iterator[None]:
    """What is merged is not compared with what was scanned."""
    with mock.patch.object(PieceDigests, "check", return_value=None):
        yield


@contextmanager
def take_conflicts_for_existing_objects() -> Iterator[None]:
    """The answer 409 of a server that gave a request up counts as an object that exists.

    Reading the object, which is not there, would show the fault: that is left out, too.
    """
    real_create = confirm_module.create

    def create(store: Any, key: str, data: bytes, **options: Any) -> Stored:
        try:
            store.put_new(key, data)
        except AlreadyExists:
            return Stored(store.read(key) if store.exists(key) else data, False)
        return real_create(store, key, data, **options)

    with (
        mock.patch.object(translation_module, "_is_conflict", return_value=False),
        mock.patch.object(confirm_module, "create", create),
    ):
        yield


@contextmanager
def forget_own_record() -> Iterator[None]:
    """A run whose record exists when it creates it takes it for another run's."""

    class Forgetful:
        @staticmethod
        def create(store: Any, key: str, data: bytes) -> Stored:
            stored = confirm_module.create(store, key, data)
            return stored if stored.is_new else Stored(b"", False)

    with mock.patch.object(run_records_module, "confirm", Forgetful):
        yield
