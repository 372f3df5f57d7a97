"""Stores by URI. This is the only module that knows which schemes there are.

A scheme is registered as `module:Class`, which is imported at its first use. Third parties register
classes for schemes of their own in the entry-point group `mmerge.stores` (docs/storage.md).
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from mmerge.manifests.errors import StoreError
from mmerge.manifests.redaction import has_user_info, redact
from mmerge.manifests.stores.base import ReadableStore, Store

ENTRY_POINT_GROUP = "mmerge.stores"
LOCAL_SCHEME = "file"
"""The scheme of a URI that is a plain path, too."""
BUILT_IN_STORES: Mapping[str, str] = {
    LOCAL_SCHEME: "mmerge.manifests.stores.local:LocalStore",
    "memory": "mmerge.manifests.stores.memory:MemoryStore",
    "s3": "mmerge.manifests.stores.object_store:ObjectStore",
    "gs": "mmerge.manifests.stores.object_store:ObjectStore",
    "az": "mmerge.manifests.stores.object_store:ObjectStore",
    "hf": "mmerge.manifests.stores.hub:HubStore",
}

_was_opened = threading.Event()


def open_store(uri: str, *, create: bool = False) -> Store:
    """Return the store at `uri`, to read and write; with `create` a missing folder is made.

    Raises:
        NotFound: there is no such folder.
        StoreError: the URI is not understood, the folder cannot be made, or the store is read-only.
    """
    store = _open(uri, create=create)
    if not isinstance(store, Store):
        raise StoreError(
            f"{store.uri}: can only be read. Write to a folder or bucket, then use 'mmerge push'"
        )
    return store


def open_readable_store(uri: str) -> ReadableStore:
    """Return the store at `uri`, to read; a repository of the Hub is one too.

    Raises:
        NotFound: there is no such folder or repository.
        StoreError: the URI is not understood.
    """
    return _open(uri, create=False)


def _open(uri: str, *, create: bool) -> ReadableStore:
    check_uri(uri)
    if create and "#" in uri:
        raise StoreError(
            f"{uri}: has a '#', which separates a store from a composite's name (STORE#NAME)."
            " Choose a place without it"
        )
    _was_opened.set()
    return find_store_class(uri).open(uri, create=create)


def was_any_opened() -> bool:
    """Return whether this process has opened a store, whose library may have started threads."""
    return _was_opened.is_set()


def pin_uri(uri: str) -> str:
    """Return the URI of the immutable version that `uri` names now, such as a commit of the Hub.

    Raises:
        NotFound: there is no such repository or revision.
        StoreUnavailable: the server does not answer, and no cache knows the revision.
    """
    return find_store_class(uri).pin(uri)


def find_store_class(uri: str) -> type[ReadableStore]:
    """Return the store class that is registered for the scheme of a URI.

    Raises:
        StoreError: the scheme is unknown, or its class cannot be imported.
    """
    scheme = scheme_of(uri) or LOCAL_SCHEME
    target = BUILT_IN_STORES.get(scheme)
    if target is not None:
        module, _, name = target.partition(":")
        store_class: type[ReadableStore] = getattr(importlib.import_module(module), name)
        return store_class
    return _load_third_party(uri, scheme)


def _load_third_party(uri: str, scheme: str) -> type[ReadableStore]:
    third_party = _third_party_stores()
    if scheme not in third_party:
        names = [f"{name}://" for name in sorted({*BUILT_IN_STORES, *third_party})]
        raise StoreError(
            f"{uri}: unknown scheme {scheme!r}. Use a folder or one of {', '.join(names)}"
        )
    entry_point = third_party[scheme]
    try:
        store_class = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise StoreError(
            f"{uri}: the store {entry_point.value!r} of the entry point {scheme!r} cannot be"
            f" imported ({error}). Reinstall the package that provides it"
        ) from error
    if not (isinstance(store_class, type) and issubclass(store_class, ReadableStore)):
        raise StoreError(
            f"{uri}: {entry_point.value!r}, registered for {scheme}://, is no ReadableStore class"
        )
    return store_class


@cache
def _third_party_stores() -> dict[str, EntryPoint]:
    # Cached: to search all installed packages takes milliseconds, and workers open many stores.
    return {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI in lower case, empty for a path."""
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]{1,30})://", uri)
    return match[1].lower() if match else ""


def is_local(uri: str) -> bool:
    """Return whether `uri` names a folder of this machine."""
    return scheme_of(uri) in ("", LOCAL_SCHEME)


def to_local_path(uri: str) -> Path:
    """Return the folder that a local `uri` names: a path, or file:// and an absolute path."""
    return Path(uri[len("file://") :] if scheme_of(uri) else uri)


def is_unicode(text: str) -> bool:
    """Return whether a text can be stored: a file name that is not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_uri(uri: str) -> None:
    """Check the form of a URI or path, before anything is made of it.

    Raises:
        StoreError: it holds a user name or password, a query, or characters that no name has; the
            message does not repeat a secret. Or it is a file:// URI of another host.
    """
    scheme = scheme_of(uri)
    if scheme and has_user_info(uri):
        raise StoreError(
            f"{redact(uri)}: a URI holds no user name or password: credentials come from the"
            " environment (docs/storage.md)"
        )
    if scheme not in ("", LOCAL_SCHEME) and "?" in uri:
        raise StoreError(
            f"{uri.partition('?')[0]}: a URI holds no query: credentials and options come from the"
            " environment (docs/storage.md)"
        )
    if scheme == LOCAL_SCHEME and not uri[len("file://") :].startswith("/"):
        raise StoreError(f"{uri}: expected file:// and an absolute path, as in file:///data/store")
    if scheme and not is_unicode(uri):
        raise StoreError(f"{uri!r}: is no Unicode text")
    controls = [character for character in uri if ord(character) < 32 or ord(character) == 127]
    if controls:
        raise StoreError(
            f"{uri!r}: has the control character {controls[0]!r}. Choose a name without it"
        )


def prefetch_bytes(uri: str) -> int:
    """Return the most memory that reading one object forward at `uri` holds in advance, in bytes.

    Raises:
        StoreError: the scheme is unknown.
    """
    return find_store_class(uri).prefetch_bytes
