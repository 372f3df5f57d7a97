"""What explored processes do: the commit of a small build, and a collection, by product code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

from models.exploration import Contents
from models.tiny_builds import digest, needed_keys

from mmerge.manifests.errors import MissingObjects, StoreError
from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    entry_key,
    object_key,
    read_entry,
    write_entry,
)
from mmerge.manifests.format.manifest import (
    BaseRecord,
    Manifest,
    manifest_key,
    to_manifest_bytes,
)
from mmerge.manifests.format.publish import make_table_entry
from mmerge.manifests.format.references import write_reference
from mmerge.manifests.format.table import make_table
from mmerge.manifests.maintenance.fenced_commit import FencedCommit
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.base import Store

NAME = "omni"
_EMPTY_TABLE = make_table(())


@dataclass(frozen=True)
class SmallBuild:
    """A build of objects that hold their own name; no tensor is ever read from it."""

    build: str
    objects: tuple[str, ...]

    @classmethod
    def make(cls, letter: str, objects: str) -> SmallBuild:
        """Return a build named by one letter, of objects named by one letter each."""
        return cls(letter * 64, tuple(name * 64 for name in objects))

    def entry(self, name: str) -> ShardEntry:
        data = name.encode()
        return ShardEntry(
            object=ObjectEntry(
                key=object_key(name),
                shard="",
                role="merge",
                num_bytes=len(data),
                digest=digest(data),
            ),
            tensors=(),
        )

    @property
    def table(self) -> bytes:
        return _EMPTY_TABLE

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(
            build=self.build,
            kind="plain",
            method="linear",
            parameters={},
            merge="all",
            dtype="BF16",
            base=BaseRecord(revision="0" * 64, files=()),
            experts=(),
            entries=tuple(self.entry(name).object for name in self.objects),
            table=make_table_entry(self.build, self.table),
        )

    def contents(self, seconds: float) -> Contents:
        """Return what the store holds of this build."""
        items = {
            manifest_key(self.build): to_manifest_bytes(self.manifest),
            self.manifest.table.key: self.table,
        }
        for name in self.objects:
            items[object_key(name)] = name.encode()
            items[entry_key(name)] = self.entry(name).model_dump_json(exclude_none=True).encode()
        return {key: (data, seconds) for key, data in items.items()}

    def missing(self, contents: Contents) -> list[str]:
        """Return the keys of this build that are not in the store."""
        return sorted(self.needed_keys - contents.keys())

    @cached_property
    def needed_keys(self) -> set[str]:
        """Every key of this build."""
        return needed_keys(to_manifest_bytes(self.manifest))


def write_build(store: Store, small: SmallBuild) -> tuple[str, int]:
    """Commit a build under the name, as a run does; return the build and its number."""
    with Lease(store, "run") as lease:
        lease.wait_for_none("collect")
        try:
            return _write_once(lease, small)
        except MissingObjects:
            return _write_once(lease, small)


def _write_once(lease: Lease, small: SmallBuild) -> tuple[str, int]:
    for name in small.objects:
        if read_entry(lease.store, name) is None:
            with lease.store.open_writer(object_key(name)) as out:
                out.write(name.encode())
            write_entry(lease.store, name, small.entry(name))
    FencedCommit(lease, small.manifest).publish(small.table)
    commit = FencedCommit(lease, small.manifest)
    reference, _ = commit.write_reference(NAME, sources={}, versions={})
    return small.build, reference.number


def refer(store: Store, small: SmallBuild) -> tuple[str, int]:
    """Create a reference to a stored build without any lease, as a writer whose lease expired."""
    reference, _ = write_reference(store, NAME, small.build, sources={}, versions={})
    return small.build, reference.number


def collect(store: Store, grace: float) -> Any:
    """Collect garbage."""
    return collect_garbage(store, grace=timedelta(seconds=grace), delete=True).deleted


def collect_entries(store: Store) -> Any:
    """Collect garbage in a store that refuses to delete objects, once their entries are deleted."""
    delete = store.delete

    def refuse(key: str) -> None:
        if key.endswith(".safetensors"):
            raise StoreError(f"{store.uri}: {key}: access denied")
        delete(key)

    store.delete = refuse  # type: ignore[method-assign]
    return collect(store, 0.0)


def refer_and_collect(store: Store, *builds: SmallBuild) -> Any:
    """Give the name to several builds, one after the other, and collect garbage."""
    for small in builds:
        refer(store, small)
    return collect(store, 0.0)
