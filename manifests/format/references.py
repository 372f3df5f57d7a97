"""Names that move: `NAME@latest` is the highest of the numbered objects refs/NAME/000042.json, each
created once.

A composite is addressed as STORE, STORE#NAME, STORE#NAME@N or STORE#DIGEST (at least 6 digits of
the build's name).
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
    """One number of a name: which build, made when, from what, by which versions."""

    name: str = Field(pattern=NAME_PATTERN)
    number: int = Field(ge=1)
    build: str = Field(pattern=DIGEST_PATTERN)
    created: str
    sources: dict[str, str]
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """The key of the stored reference."""
        return f"refs/{self.name}/{self.number:06d}.json"


def list_references(store: ReadableStore) -> dict[str, list[int]]:
    """Return the numbers of every name in the store, in ascending order."""
    found: dict[str, list[int]] = {}
    for key in store.list("refs"):
        match = re.fullmatch(r"refs/([^/]+)/(\d{6,})\.json", key)
        if match and re.match(NAME_PATTERN, match[1]):
            found.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(numbers) for name, numbers in sorted(found.items())}


def read_reference(store: ReadableStore, name: str, number: int) -> Reference:
    """Return one reference. Raises ManifestError when it is damaged."""
    key = f"refs/{name}/{number:06d}.json"
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
    """Let NAME@latest be `build`; return the reference and whether it was moved (False when it
    pointed there already).
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
            other = read_reference(store, name, number)
            if other.build == build:
                return other, False
            number += 1
            continue
        if store.is_remote and read_reference(store, name, number).build != build:
            # A server that lets several writers create: one of the same moment replaced ours, take
            # the next number
            number += 1
            continue
        return reference, True


def split_uri(uri: str) -> tuple[str, str]:
    """Return the store's URI and what stands behind `#` (empty if nothing)."""
    store_uri, _, fragment = uri.partition("#")
    return store_uri, fragment


def open_build(uri: str) -> tuple[ReadableStore, str]:
    """Return the store and the build digest that a composite's URI names.

    Raises:
        StoreError: the store cannot be opened.
        ManifestError: the store has no such build, or several that fit.
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
    """Return the digest of the build that `fragment` (NAME, NAME@N, NAME@latest, DIGEST or nothing)
    names in a store.
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
        fitting = [build for build in builds if build.startswith(fragment)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ManifestError(
                f"{store.uri}: {len(fitting)} builds begin with {fragment}: give more digits"
            )
    known = ", ".join(references) or "none"
    raise ManifestError(f"{store.uri}: no composite {fragment!r}; names there: {known}")


def find_reference(store: ReadableStore, fragment: str, build: str) -> Reference | None:
    """Return the reference by which `fragment` names a build, or else the newest one that points to
    it, or None.
    """
    references = list_references(store)
    name, _, number = fragment.partition("@")
    if name in references:
        return read_reference(
            store, name, int(number) if number.isdigit() else references[name][-1]
        )
    found = [
        read_reference(store, name, number)
        for name, numbers in references.items()
        for number in numbers
    ]
    return max(
        (one for one in found if one.build == build),
        key=lambda one: (one.created, one.number),
        default=None,
    )


def to_summary(reference: Reference) -> dict[str, Any]:
    """Return what `mmerge show` prints of a reference."""
    return {
        "name": reference.name,
        "number": reference.number,
        "build": reference.build,
        "created": reference.created,
    }
