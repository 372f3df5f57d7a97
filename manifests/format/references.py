"""Mutable references: `NAME@latest` resolves to the highest-numbered `refs/NAME/000042.json`.

Each numbered object is created exactly once and never overwritten. A composite is addressed as
STORE, STORE#NAME, STORE#NAME@N or STORE#DIGEST (at least 6 digits of the build's name).

A number keeps its meaning for ever. Before `refs/NAME/000042.json` is deleted, the *deletion mark*
`refs/NAME/000042.deleted` is put, and it stays. A marked number counts as deleted whatever else is
stored, so that a writer that chose it long ago and creates it now changes nothing:

- a writer creates its number, then looks for the mark, and takes the next number if there is one;
- a reader reads the number, then looks for the mark: an object that such a writer made is younger
  than the mark, so a reader of the object sees the mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from pydantic import Field, ValidationError

from mmerge.manifests.digest import parse_json, to_canonical_json
from mmerge.manifests.errors import ManifestError, NotFound, StoreError, first_line
from mmerge.manifests.format.entry import (
    DIGEST_PATTERN,
    Record,
    check_checksum,
    to_checked_json,
)
from mmerge.manifests.stores import confirm
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.open import open_readable_store

MAX_REFERENCE_BYTES = 1 << 20
LISTING_ATTEMPTS = 4
"""Listings of references, of which each may name one that is deleted before it is read."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Reference(Record):
    """One number of a name: its build, the time of creation, the inputs, and versions."""

    name: str = Field(pattern=NAME_PATTERN)
    number: int = Field(ge=1)
    build: str = Field(pattern=DIGEST_PATTERN)
    created: str
    sources: dict[str, str]
    versions: dict[str, str]
    manifest: str | None = Field(default=None, pattern=DIGEST_PATTERN)
    """Digest of the manifest; None in references of version 0.1 and earlier."""
    checksum: str | None = None
    """Digest of the other fields as they are stored; None where `manifest` is."""

    @property
    def key(self) -> str:
        """The key of the stored reference."""
        return reference_key(self.name, self.number)


def reference_key(name: str, number: int) -> str:
    """Return the key of one number of a name."""
    return f"refs/{name}/{number:06d}.json"


def parse_reference_key(key: str) -> tuple[str, int] | None:
    """Return the name and the number of a reference's key, None of any other key."""
    match = re.fullmatch(r"refs/([^/]+)/([0-9]{6,})\.json", key)
    if match is None or not re.fullmatch(NAME_PATTERN, match[1]):
        return None
    return match[1], int(match[2])


def deletion_mark_key(name: str, number: int) -> str:
    """Return the key of the mark that says that one number of a name is deleted, for ever."""
    return f"refs/{name}/{number:06d}.deleted"


@dataclass(frozen=True)
class ReferenceNumbers:
    """The numbers of one name: those that can be read, and those that are deleted."""

    live: tuple[int, ...] = ()
    """In ascending order."""
    deleted: frozenset[int] = field(default_factory=frozenset)

    @property
    def next_number(self) -> int:
        """The lowest number above all that were ever used."""
        return max((0, *self.live, *self.deleted)) + 1


def list_reference_numbers(store: ReadableStore, name: str = "") -> dict[str, ReferenceNumbers]:
    """Return the live and the deleted numbers of one name, of all names if it is empty."""
    numbers: dict[str, set[int]] = {}
    deleted: dict[str, set[int]] = {}
    for key in store.list(f"refs/{name}" if name else "refs"):
        match = re.fullmatch(r"refs/([^/]+)/([0-9]{6,})\.(json|deleted)", key)
        if match and re.fullmatch(NAME_PATTERN, match[1]):
            kind = numbers if match[3] == "json" else deleted
            kind.setdefault(match[1], set()).add(int(match[2]))
    return {
        found_name: ReferenceNumbers(
            live=tuple(sorted(numbers.get(found_name, set()) - deleted.get(found_name, set()))),
            deleted=frozenset(deleted.get(found_name, ())),
        )
        for found_name in sorted(numbers.keys() | deleted.keys())
    }


def list_references(store: ReadableStore) -> dict[str, list[int]]:
    """Return the numbers of every name in the store, in ascending order; no deleted ones."""
    names = list_reference_numbers(store)
    return {name: list(numbers.live) for name, numbers in names.items() if numbers.live}


def read_reference(store: ReadableStore, name: str, number: int) -> Reference:
    """Return one reference.

    Raises:
        NotFound: there is no such number, or it was deleted.
        ManifestError: it is damaged.
    """
    key = reference_key(name, number)
    try:
        data = store.read(key, max_bytes=MAX_REFERENCE_BYTES)
    except NotFound as error:
        _check_not_deleted(store, name, number)
        raise NotFound(
            f"{store.uri}: {name}@{number} is not there, or another process has just deleted it."
            f" 'mmerge log {store.uri}#{name}' lists the numbers that are left"
        ) from error
    # After the read: see the module's docstring.
    _check_not_deleted(store, name, number)
    return _parse_reference(store, name, number, data)


def read_latest_reference(
    store: ReadableStore, name: str
) -> tuple[ReferenceNumbers, Reference | None]:
    """Return the numbers of a name, and its latest reference, None if no number is left.

    They are listed again if the latest one is deleted before it is read.

    Raises:
        NotFound: that has happened several times.
        ManifestError: the latest reference is damaged.
    """
    for attempt in range(1, LISTING_ATTEMPTS + 1):
        numbers = list_reference_numbers(store, name).get(name, ReferenceNumbers())
        if not numbers.live:
            break
        try:
            return numbers, read_reference(store, name, numbers.live[-1])
        except NotFound:
            if attempt == LISTING_ATTEMPTS:
                raise
    return numbers, None


def _check_not_deleted(store: ReadableStore, name: str, number: int) -> None:
    if store.exists(deletion_mark_key(name, number)):
        raise NotFound(
            f"{store.uri}: {name}@{number} was deleted. 'mmerge log {store.uri}#{name}' lists the"
            " numbers that are left"
        )


def _parse_reference(store: ReadableStore, name: str, number: int, data: bytes) -> Reference:
    key = reference_key(name, number)
    try:
        raw = parse_json(data, what=key)
        check_checksum(raw)
        reference = Reference.model_validate(raw)
        if (reference.name, reference.number) != (name, number):
            raise ValueError(f"it says that it is {reference.name}@{reference.number}")
    except (ValueError, ValidationError) as error:
        raise ManifestError(
            f"{store.uri}: {key} is damaged ({first_line(error)}). 'mmerge delete"
            f" {store.uri}#{name}@{number} --yes' removes it; then 'mmerge run RECIPE' gives its"
            " build a new number"
        ) from error
    return reference


def to_reference_bytes(reference: Reference) -> bytes:
    """Return the stored form of a reference."""
    return to_checked_json(reference)


def write_reference(
    store: Store,
    name: str,
    build: str,
    *,
    sources: dict[str, str],
    versions: dict[str, str],
    manifest: str | None = None,
    check: Callable[[], None] = lambda: None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> tuple[Reference, bool]:
    """Make NAME@latest resolve to `build`; return the reference, and whether it is new.

    It is not new if the latest number is already of that build.

    Args:
        store: the store, which has the build.
        name: the name.
        build: the digest of the build.
        sources: the inputs of the build, by their names in the recipe.
        versions: of the packages that made it.
        manifest: the digest of the build's manifest: whoever opens the build by its name compares
            it.
        check: called immediately before a number is created; what it raises ends the call.
        now: returns the time of creation.

    Raises:
        StoreUnavailable: the store loses or changes what it is sent.
        StoreError: the store cannot be written.
    """
    numbers, latest = read_latest_reference(store, name)
    if latest is not None and latest.build == build:
        return latest, False
    number = numbers.next_number
    while True:
        # Microseconds: two writers of one build hardly ever write equal references.
        created = now().isoformat(timespec="microseconds")
        reference = Reference(
            name=name,
            number=number,
            build=build,
            created=created,
            sources=sources,
            versions=versions,
            manifest=manifest,
        )
        data = to_reference_bytes(reference)
        stored = confirm.create(store, reference.key, data, check=check).data
        if store.exists(deletion_mark_key(name, number)):
            # The number was used and deleted while this writer was held up.
            store.delete(reference.key)
        elif stored == data:
            return reference, True
        else:
            existing = _parse_reference(store, name, number, stored)
            if existing.build == build:
                return existing, False
        # Listed again: a long way behind, one would collide with every number there is.
        numbers = list_reference_numbers(store, name).get(name, ReferenceNumbers())
        number = max(number + 1, numbers.next_number)


def delete_reference(
    store: Store, name: str, number: int, *, check: Callable[[], None] = lambda: None
) -> None:
    """Delete one number of a name; the number is never used again.

    Its build stays. A number that is deleted already is no error. `check` is called immediately
    before each change; what it raises ends the call.

    Raises:
        NotFound: the name never had this number.
        StoreError: the store cannot be written; the number is deleted or unchanged.
    """
    key, mark = reference_key(name, number), deletion_mark_key(name, number)
    if not store.exists(mark):
        if not store.exists(key):
            raise NotFound(f"{store.uri}: {name} has no number {number}")
        check()
        # Confirmed: if the mark were lost, the number could be used again.
        confirm.put(store, mark, to_canonical_json({"name": name, "number": number}))
    check()
    store.delete(key)


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
    store, build, _ = open_reference(uri)
    return store, build


def open_reference(uri: str) -> tuple[ReadableStore, str, Reference | None]:
    """Return what `open_build` does, and the reference that names the build.

    The reference is None where the URI has the digest of the build.
    """
    store_uri, fragment = split_uri(uri)
    try:
        store = open_readable_store(store_uri)
    except StoreError as error:
        raise StoreError(
            f"{Exception.__str__(error)}. Give the 'output' of a recipe that was run, as STORE or"
            " STORE#NAME"
        ) from error
    build, reference = resolve(store, fragment)
    return store, build, reference


def find_build(store: ReadableStore, fragment: str) -> str:
    """Return the digest of the build that `fragment` names in a store, see `resolve`."""
    return resolve(store, fragment)[0]


def resolve(store: ReadableStore, fragment: str) -> tuple[str, Reference | None]:
    """Return the digest of the build that `fragment` names in a store, and the reference that does.

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
            _, latest = read_latest_reference(store, name)
            if latest is not None:
                return latest.build, latest
            raise ManifestError(
                f"{store.uri}: every number of {name} was deleted. 'mmerge run RECIPE' makes one"
            )
        if _is_number(number) and int(number) in references[name]:
            reference = read_reference(store, name, int(number))
            return reference.build, reference
        remaining = ", ".join(map(str, references[name]))
        if _is_number(number) and store.exists(deletion_mark_key(name, int(number))):
            raise ManifestError(f"{store.uri}: {name}@{number} was deleted; {name} has {remaining}")
        raise ManifestError(f"{store.uri}: {name} has no number {number!r}; it has {remaining}")
    if re.fullmatch(r"[0-9a-f]{6,64}", fragment):
        builds = sorted(
            {key.split("/")[1] for key in store.list("builds") if key.endswith("/manifest.json")}
        )
        matching = [build for build in builds if build.startswith(fragment)]
        if len(matching) == 1:
            return matching[0], None
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
            store, name, int(number) if _is_number(number) else references[name][-1]
        )
    candidates: list[Reference] = []
    for name, numbers in references.items():
        candidates += [read_reference(store, name, number) for number in numbers]
    return max(
        (reference for reference in candidates if reference.build == build),
        key=lambda reference: (reference.created, reference.number),
        default=None,
    )


def _is_number(text: str) -> bool:
    """Return whether a text is a number in ASCII digits (`str.isdigit` accepts others)."""
    return re.fullmatch("[0-9]{1,18}", text) is not None


def to_summary(reference: Reference) -> dict[str, Any]:
    """Return the fields of a reference that `mmerge show` prints."""
    return {
        "name": reference.name,
        "number": reference.number,
        "build": reference.build,
        "created": reference.created,
    }
