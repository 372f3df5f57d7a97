"""A bucket of a simulation under the project's own object store.

It stands in for the `obstore` functions that `ObjectStore` calls, request by request, so that the
retries, the confirmation of writes and the translation of errors are those of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import obstore
from models.simulated_store import Stored, World
from obstore.exceptions import AlreadyExistsError, GenericError, NotFoundError

import mmerge.manifests.stores.object_store as object_store_module
from mmerge.manifests.errors import AlreadyExists, NotFound, StoreUnavailable
from mmerge.manifests.stores.object_store import ObjectStore

CONFLICT = (
    "Object at location {key} already exists:\nError performing PUT {key} in 1ms - Server returned"
    " non-2xx status code: 409 Conflict: <Error><Code>ConditionalRequestConflict</Code></Error>"
)


def make_object_store(world: World) -> ObjectStore:
    """Return the project's object store over the bucket of a world."""
    return ObjectStore(world.uri, world)


class SimulatedObstore:
    """The functions of `obstore`; a world stands in for the client."""

    def __getattr__(self, name: str) -> Any:
        return getattr(obstore, name)

    @staticmethod
    def head(world: World, key: str) -> dict[str, Any]:
        with _library_errors():
            return _meta(key, world.call("head", key, lambda lie: world.find(key)))

    @staticmethod
    def get(world: World, key: str, *, options: dict[str, Any] | None = None) -> Response:
        with _library_errors():
            stored, data = world.call(
                "get", key, lambda lie: (world.find(key), world.read(key, lie))
            )
            start, stop = (options or {}).get("range", (0, len(data)))
            return Response(_meta(key, stored), data[start:stop])

    @staticmethod
    def get_range(
        world: World, key: str, *, start: int, end: int | None = None, length: int | None = None
    ) -> bytes:
        with _library_errors():
            data = world.call("get", key, lambda lie: world.read(key, lie))
        stop = end if end is not None else start + (length or 0)
        return data[start:stop]

    @staticmethod
    def get_ranges(
        world: World,
        key: str,
        *,
        starts: Sequence[int],
        ends: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        coalesce: int = 0,
    ) -> list[bytes]:
        with _library_errors():
            data = world.call("get", key, lambda lie: world.read(key, lie))
        stops = ends or [
            start + length for start, length in zip(starts, lengths or (), strict=True)
        ]
        return [data[start:stop] for start, stop in zip(starts, stops, strict=True)]

    @staticmethod
    def list(world: World, prefix: str | None = None, **options: Any) -> list[list[dict[str, Any]]]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        with _library_errors():
            listed = world.call("list", folder, lambda lie: world.list_below(folder))
        return [
            [
                {"path": item.key, "size": item.num_bytes, "last_modified": item.modified}
                for item in listed
            ]
        ]

    @staticmethod
    def put(
        world: World, key: str, data: Any, *, mode: str = "overwrite", **options: Any
    ) -> dict[str, Any]:
        verb = "put_new" if mode == "create" else "put"
        raw = bytes(data)

        def effect(lie: str | None) -> None:
            if lie == "conflict" and verb == "put_new":
                # What the library makes of a 409: a concurrent request won or lost, nobody knows.
                raise AlreadyExistsError(CONFLICT.format(key=key))
            world.store(key, raw, replace=mode != "create", lie=lie)

        with _library_errors():
            world.call(verb, key, effect)
        return {"e_tag": None, "version": None}

    @staticmethod
    def delete(world: World, key: str) -> None:
        with _library_errors():
            world.call("delete", key, lambda lie: world.remove(key))

    @staticmethod
    def open_writer(world: World, key: str, **options: Any) -> Writer:
        return Writer(world, key)


class Writer:
    """A multipart upload: visible when it is closed."""

    def __init__(self, world: World, key: str) -> None:
        self._world, self._key, self._data = world, key, bytearray()

    def write(self, data: bytes) -> None:
        self._data += data

    def close(self) -> None:
        data = bytes(self._data)
        with _library_errors():
            self._world.call(
                "put",
                self._key,
                lambda lie: self._world.store(self._key, data, replace=True, lie=lie),
            )


class Response:
    """The answer to a GET."""

    def __init__(self, meta: dict[str, Any], data: bytes) -> None:
        self.meta, self._data = meta, data

    def bytes(self) -> bytes:
        return self._data

    def stream(self, min_chunk_size: int = 0) -> Iterator[bytes]:  # type: ignore[valid-type]
        yield self._data


def _meta(key: str, stored: Stored) -> dict[str, Any]:
    return {
        "path": key,
        "size": len(stored.data),
        "e_tag": f'"{stored.version}"',
        "last_modified": stored.modified,
        "version": None,
    }


@contextmanager
def _library_errors() -> Iterator[None]:
    """Raise the library's errors in place of the store's, as a server's answers do."""
    try:
        yield
    except NotFound as error:
        raise NotFoundError(str(error)) from None
    except AlreadyExists as error:
        raise AlreadyExistsError(str(error)) from None
    except StoreUnavailable as error:
        raise GenericError(str(error)) from None


@contextmanager
def simulated_buckets() -> Iterator[None]:
    """Let the object store reach simulated buckets within the context."""
    with mock.patch.object(object_store_module, "obstore", SimulatedObstore()):
        yield
