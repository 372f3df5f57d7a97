"""Mutable references: `NAME@latest` resolves to the highest-numbered `refs/NAME/000042.json`.

Each numbered object is created exactly once and never overwritten. A composite is addressed as
STORE, STORE#NAME, STORE#NAME@N or STORE#DIGEST (at least 6 digits of the build's name).
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from pydantic import Field, ValidationError

from mmerge.manifests.digest import parse_json, to_canonical_json
from mmerge.manifests.errors import AlreadyExists, ManifestError, StoreError
from mmerge.manifests.format.entry import DIGEST_PATTERN, Record
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.open import open_readable_store

MAX_REFERENCE_BYTES = 1 << 20
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Reference(Record):
    """One number of a name: its build, the time of creation, the inputs, and versions."""

    name: str = Field(pattern=NAME_PATTERN)
    number: int = Field(ge=1)
    build: str = Field(pattern=DIGEST_PATTERN)
    created: str
    sources: dict[str, str]
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """The key of the stored reference."""
        return reference_key(self.name, self.number)


def reference_key(name: str, number: int) -> str:
    """Return the key of one number of a name."""
    return f"refs/{name}/{number:06d}.json"


def list_references(store: ReadableStore) -> dict[str, list[int]]:
    """Return the numbers of every name in the store, in ascending order."""
    references: dict[str, list[int]] = {}
    for key in store.list("refs"):
        match = re.fullmatch(r"refs/([^/]+)/(\d{6,})\.json", key)
        if match and re.match(NAME_PATTERN, match[1]):
            references.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(numbers) for name, numbers in sorted(references.items())}


def read_reference(store: ReadableStore, name: str, number: int) -> Reference:
    """Return one reference. Raises ManifestError when it is damaged."""
    key = reference_key(name, number)
    try:
        return Reference.model_validate(
            parse_json(store.read(key, max_bytes=MAX_REFERENCE_BYTES), what=key)
        )
    except (ValueError, ValidationError) as error:
        raise ManifestError(
            f"{store.uri}: {key} is damaged ({str(error).splitlines()[0]})"
        ) from error


def write_reference(
    store: Store, name: str, build: str, *, sources: dict[str, str], versions: dict[str, str]
) -> tuple[Reference, bool]:
    """Make NAME@latest resolve to `build`; return the reference, and whether it is new.

    It is not new if the latest number is already of that build.
    """
    numbers = list_references(store).get(name, [])
    if numbers:
        latest = read_reference(store, name, numbers[-1])
        if latest.build == build:
            return latest, False
    number = (numbers[-1] if numbers else 0) + 1
    while True:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        reference = Reference(
            name=name,
            number=number,
            build=build,
            created=created,
            sources=sources,
            versions=versions,
        )
        try:
            store.put_new(reference.key, to_canonical_json(reference.model_dump(mode="json")))
        except AlreadyExists:
            existing = read_reference(store, name, number)
            if existing.build == build:
                return existing, False
            number += 1
            continue
        if store.is_remote and read_reference(store, name, number).build != build:
            # This server lets several writers create a key, and another one replaced ours: take the
            # next number.
            number += 1
            continue
        return reference, True


def split_uri(uri: str) -> tuple[str, str]:
    """Return the URI of the store, and the fragment after `#` (empty if none)."""
    store_uri, _, fragment = uri.partition("#")
    return store_uri, fragment


def open_build(uri: str) -> tuple[ReadableStore, str]:
    """Return the store and the build that a composite's URI names; the build as its digest.

    Raises:
        StoreError: the store cannot be opened.
        ManifestError: the store has no such build, or several that match.
    """
    store_uri, fragment = split_uri(uri)
    try:
        store = open_readable_store(store_uri)
    except StoreError as error:
        raise StoreError(
            f"{Exception.__str__(error)}. Give the 'output' of a recipe that was run, as STORE or"
            " STORE#NAME"
        ) from error
    return store, find_build(store, fragment)


def find_build(store: ReadableStore, fragment: str) -> str:
    """Return the digest of the build that `fragment` names in a store.

    `fragment` is NAME, NAME@N, NAME@latest or DIGEST; empty, it names the store's only composite.

    Raises:
        ManifestError: the store has no such build, or several that match.
    """
    references = list_references(store)
    if not fragment:
        if len(references) == 1:
            fragment = next(iter(references))
        elif references:
            raise ManifestError(
                f"{store.uri}: holds several composites: add one of"
                f" {', '.join('#' + name for name in references)} to the URI"
            )
        else:
            raise ManifestError(f"{store.uri}: holds no composite. 'mmerge run RECIPE' makes one")
    name, _, number = fragment.partition("@")
    if name in references:
        if number in ("", "latest"):
            return read_reference(store, name, references[name][-1]).build
        if number.isdigit() and int(number) in references[name]:
            return read_reference(store, name, int(number)).build
        raise ManifestError(
            f"{store.uri}: {name} has no number {number!r}; it has"
            f" {', '.join(map(str, references[name]))}"
        )
    if re.fullmatch(r"[0-9a-f]{6,64}", fragment):
        builds = sorted(
            {key.split("/")[1] for key in store.list("builds") if key.endswith("/manifest.json")}
        )
        matching = [build for build in builds if build.startswith(fragment)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise ManifestError(
                f"{store.uri}: {len(matching)} builds begin with {fragment}: give more digits"
            )
    names = ", ".join(references) or "none"
    raise ManifestError(f"{store.uri}: no composite {fragment!r}; names there: {names}")


def find_reference(store: ReadableStore, fragment: str, build: str) -> Reference | None:
    """Return the reference by which `fragment` names a build, else the newest one of that build.

    Returns None if no reference is of that build.
    """
    references = list_references(store)
    name, _, number = fragment.partition("@")
    if name in references:
        return read_reference(
            store, name, int(number) if number.isdigit() else references[name][-1]
        )
    candidates: list[Reference] = []
    for name, numbers in references.items():
        candidates += [read_reference(store, name, number) for number in numbers]
    return max(
        (reference for reference in candidates if reference.build == build),
        key=lambda reference: (reference.created, reference.number),
        default=None,
    )


def to_summary(reference: Reference) -> dict[str, Any]:
    """Return the fields of a reference that `mmerge show` prints."""
    return {
        "name": reference.name,
        "number": reference.number,
        "build": reference.build,
        "created": reference.created,
    }
