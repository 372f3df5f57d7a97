"""Delete one build: its references first, then its manifest and table.

Nothing damaged stands in the way: a build is found by the keys below `builds/`, and a damaged
reference is deleted by its own number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import ManifestError, NotFound, StoreError
from mmerge.manifests.format.manifest import manifest_key, needed_keys
from mmerge.manifests.format.references import (
    list_references,
    read_reference,
    reference_key,
)
from mmerge.manifests.maintenance.deletion import delete_keys
from mmerge.manifests.maintenance.lease import Lease, read_announced_keys
from mmerge.manifests.maintenance.manifest_checks import read_consistent_manifest
from mmerge.manifests.stores.base import Store


@dataclass(frozen=True)
class Deletion:
    """What a deletion removes, or would remove."""

    uri: str
    build: str | None
    """The digest of the build; None where only a damaged reference is deleted."""
    keys: tuple[str, ...]
    """In the order of deletion."""
    num_shared: int = 0
    """Objects and files of the build that stay, since other builds need them."""
    deleted: bool = False


def delete_build(
    store: Store, fragment: str, *, objects: bool = False, delete: bool = False
) -> Deletion:
    """Return what has to be deleted to remove a build, and delete it if `delete` is set.

    All references to the build go with it; their numbers are never used again. Its objects and
    files stay until garbage collection removes those that no other build needs.

    Args:
        store: the store.
        fragment: NAME (its newest number), NAME@N or DIGEST.
        objects: also delete the objects and files that no other build of the store lists.
        delete: delete; otherwise only report.

    Raises:
        ManifestError: there is no such build; or with `objects`, a manifest cannot be read, so that
            what it needs is unknown.
        StoreError: a run or a garbage collection is using the store.
    """
    if not delete:
        return _find_deletion(store, fragment, objects=objects)
    with Lease(store, "collect") as lease:
        claims = lease.read_idle_claims()
        announced = read_announced_keys(store, claims)
        deletion = _find_deletion(store, fragment, objects=objects, announced=announced)
        in_use = sorted(announced.intersection(deletion.keys))
        if in_use:
            raise StoreError(
                f"{store.uri}: {in_use[0]} is part of a build that a run was about to commit:"
                " nothing was deleted. Try again when it has ended; if it was killed, delete the"
                " objects claims/commit-…"
            )
        delete_keys(lease, deletion.keys)
    return replace(deletion, deleted=True)


def _find_deletion(
    store: Store, fragment: str, *, objects: bool, announced: AbstractSet[str] = frozenset()
) -> Deletion:
    """Return what has to be deleted; `announced` objects of other builds stay."""
    build, reference_keys = _find_target(store, fragment)
    if build is None:
        return Deletion(store.uri, None, tuple(reference_keys))
    build_keys = sorted(store.list(f"builds/{build}"))
    # The manifest first: a build without one does not exist.
    build_keys.sort(key=lambda key: key != manifest_key(build))
    own_keys: list[str] = []
    num_shared = 0
    if objects and manifest_key(build) in build_keys:
        needed = _read_needed_keys(store, build) - set(build_keys)
        shared = needed & (_find_needed_keys(store, except_for=build) | announced)
        num_shared = len({key for key in shared if not key.endswith(".json")})
        own_keys = sorted(needed - shared)
        # An entry says that its object is complete, so it goes before the object.
        own_keys.sort(key=lambda key: not key.endswith(".json"))
    keys = (*reference_keys, *build_keys, *own_keys)
    return Deletion(store.uri, build, keys, num_shared)


def _find_target(store: Store, fragment: str) -> tuple[str | None, list[str]]:
    """Return the digest of the build, and the keys of all references to it."""
    references = list_references(store)
    name, _, number = fragment.partition("@")
    build: str | None
    if name in references and number in ("", "latest"):
        build = read_reference(store, name, references[name][-1]).build
    elif name in references:
        if not re.fullmatch("[0-9]{1,18}", number) or int(number) not in references[name]:
            remaining = ", ".join(map(str, references[name]))
            raise ManifestError(f"{store.uri}: {name} has no number {number!r}; it has {remaining}")
        build = _read_target(store, name, int(number))
        if build is None:
            return None, [reference_key(name, int(number))]
    else:
        build = _find_digest(store, fragment, names=list(references))
    keys = [
        reference_key(each_name, each_number)
        for each_name, numbers in references.items()
        for each_number in numbers
        if _read_target(store, each_name, each_number) == build
    ]
    return build, keys


def _read_target(store: Store, name: str, number: int) -> str | None:
    """Return the build of a reference, None if it is damaged or was deleted meanwhile."""
    try:
        return read_reference(store, name, number).build
    except (ManifestError, NotFound):
        return None


def _find_digest(store: Store, fragment: str, *, names: Sequence[str]) -> str:
    if re.fullmatch(r"[0-9a-f]{6,64}", fragment):
        builds = sorted({key.split("/")[1] for key in store.list("builds")})
        matching = [build for build in builds if build.startswith(fragment)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise ManifestError(
                f"{store.uri}: {len(matching)} builds begin with {fragment}: give more digits"
            )
    raise ManifestError(
        f"{store.uri}: there is no build {fragment!r} to delete. Give STORE#NAME, STORE#NAME@N or"
        f" STORE#DIGEST; names there: {', '.join(names) or 'none'}"
    )


def _find_needed_keys(store: Store, *, except_for: str) -> set[str]:
    """Return every key that the other builds of a store need."""
    keys: set[str] = set()
    for key in sorted(store.list("builds")):
        build = key.split("/")[1]
        if build == except_for or key != manifest_key(build):
            continue
        keys |= _read_needed_keys(store, build)
    return keys


def _read_needed_keys(store: Store, build: str) -> set[str]:
    try:
        return needed_keys(read_consistent_manifest(store, build))
    except ManifestError as error:
        raise ManifestError(
            f"{Exception.__str__(error)}. What build {build[:SHOWN_DIGITS]} needs is unknown, so"
            " nothing was deleted; without --objects, the objects stay until 'mmerge gc'"
        ) from error
