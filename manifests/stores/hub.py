"""Repositories of the Hugging Face Hub as stores to read from: `hf://ORG/REPO@REVISION`, pinned to
a commit.

A file is fetched whole into the node's cache (HF_HOME) when a task first needs bytes of it; tasks
of one node share it. A header alone is read by range. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are
those of the huggingface_hub library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from mmerge.manifests.errors import NotFound, StoreError, StoreUnavailable
from mmerge.manifests.format.safetensors_header import MAX_HEADER_BYTES
from mmerge.manifests.stores.object_store import MAX_READ_BYTES, Listed, Store, check_key
from mmerge.manifests.stores.prefetch import OnPart
from mmerge.manifests.stores.writer import ObjectWriter

_URI_PATTERN = r"hf://(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?/?"
_COMMIT_PATTERN = r"[0-9a-f]{40}"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class HubFile:
    """One file of a commit."""

    num_bytes: int
    blob: str
    """The hub's identity of the content."""


def split_hub_uri(uri: str) -> tuple[str, str]:
    """Return repository and revision (`main` if none) of an hf:// URI. Raises StoreError."""
    match = re.fullmatch(_URI_PATTERN, uri)
    if not match or ".." in uri:
        raise StoreError(f"{uri}: expected hf://ORG/REPO or hf://ORG/REPO@REVISION")
    return match["repo"], match["revision"] or "main"


def pin_uri(uri: str) -> str:
    """Return an hf:// URI with the commit that its revision names now; any other URI as it is.

    Raises:
        NotFound: the hub has no such repository or revision.
        StoreUnavailable: the hub does not answer, and the cache does not know the revision.
    """
    return open_hub(uri).uri if uri.startswith("hf://") else uri


def open_hub(uri: str) -> HubStore:
    """Return the repository at an hf:// URI; `uri` of the result names the commit. Raises as
    `pin_uri`.
    """
    repo, revision = split_hub_uri(uri)
    commit = revision if re.fullmatch(_COMMIT_PATTERN, revision) else _resolve(repo, revision)
    return HubStore(repo, commit)


def _resolve(repo: str, revision: str) -> str:
    reference = _cache_folder(repo) / "refs" / revision
    if not _is_offline():
        commit = str(
            translate_errors(
                repo, revision, lambda: hub_api().repo_info(repo, revision=revision).sha
            )
        )
        with suppress(OSError):  # for a later run offline; the library keeps the same file
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)
        return commit
    try:
        return reference.read_text().strip()
    except OSError as error:
        raise StoreUnavailable(
            f"hf://{repo}@{revision}: offline, and the cache does not know this revision. Go online"
            " once, or name a commit"
        ) from error


def hub_api() -> Any:
    """Return a client of the hub, with the token and endpoint of the environment."""
    from huggingface_hub import HfApi

    return HfApi(library_name="mmerge")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def translate_errors(repo: str, what: str, operation: Callable[[], _Value]) -> _Value:
    """Return what `operation` returns. Raises NotFound, StoreUnavailable, StoreError in place of
    the errors of the library.
    """
    from huggingface_hub import errors

    where = f"hf://{repo}: {what}"
    try:
        return operation()
    except errors.GatedRepoError as error:
        raise StoreError(
            f"{where}: the repository is gated. Accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise StoreUnavailable(
            f"{where}: not in the cache, and the hub does not answer (or HF_HUB_OFFLINE is set)"
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ) as error:
        raise NotFound(
            f"{where}: not found on the hub (a private repository needs HF_TOKEN)"
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, RuntimeError) as error:
        text = str(error).strip().splitlines()
        raise StoreUnavailable(f"{where}: {text[0] if text else type(error).__name__}") from error


class HubStore(Store):
    """One commit of one repository; only the verbs that read."""

    def __init__(self, repo: str, commit: str) -> None:
        super().__init__(f"hf://{repo}@{commit}", None)
        self.repo, self.commit = repo, commit

    @cached_property
    def files(self) -> dict[str, HubFile]:
        """All files of the commit. Offline: those in the cache."""
        if _is_offline():
            return self._cached_files()
        tree = translate_errors(
            self.repo,
            self.commit,
            lambda: list(hub_api().list_repo_tree(self.repo, revision=self.commit, recursive=True)),
        )
        return {
            entry.path: HubFile(entry.size, entry.blob_id)
            for entry in tree
            if hasattr(entry, "size") and hasattr(entry, "blob_id")
        }

    def _cached_files(self) -> dict[str, HubFile]:
        snapshot = _cache_folder(self.repo) / "snapshots" / self.commit
        if not snapshot.is_dir():
            raise StoreUnavailable(
                f"{self.uri}: offline, and this commit is not in the cache {snapshot.parent}. Go"
                " online once"
            )
        found = (path for path in snapshot.rglob("*") if path.is_file())
        return {
            path.relative_to(snapshot).as_posix(): HubFile(path.stat().st_size, path.resolve().name)
            for path in found
        }

    def _file(self, key: str) -> HubFile:
        file = self.files.get(check_key(key))
        if file is None:
            raise NotFound(f"{self.uri}: {key}: not found")
        return file

    def _cached(self, key: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, check_key(key), revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, key: str) -> Path:
        """Return the path of a file in the node's cache, fetched if it is not there."""
        from huggingface_hub import hf_hub_download

        cached = self._cached(key)
        if cached is not None:
            return cached
        return Path(
            translate_errors(
                self.repo,
                key,
                lambda: hf_hub_download(
                    self.repo, check_key(key), revision=self.commit, library_name="mmerge"
                ),
            )
        )

    @override
    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        num_bytes = self._file(key).num_bytes
        if num_bytes > max_bytes:
            raise StoreError(
                f"{self.uri}: {key}: has {num_bytes:,} bytes, at most {max_bytes:,} are read"
            )
        return self.fetch(key).read_bytes()

    @override
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        data = self._read_range(key, offset, num_bytes) if num_bytes else memoryview(b"")
        on_part(data)
        return data

    def _read_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        cached = self._cached(key)
        if (
            cached is None
            and offset == 0
            and num_bytes <= MAX_HEADER_BYTES + 8
            and not _is_offline()
        ):
            head = self._read_head(key, num_bytes)
            if head is not None:
                return head
        with (cached or self.fetch(key)).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), num_bytes, offset)
        self._check_length(key, len(data), offset, num_bytes)
        return memoryview(data)

    def _read_head(self, key: str, num_bytes: int) -> memoryview | None:
        """Return the first bytes of a file without the rest; None where the server gives no ranges."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        def request() -> memoryview | None:
            headers = build_hf_headers(library_name="mmerge") | {
                "Range": f"bytes=0-{num_bytes - 1}",
                "Accept-Encoding": "identity",
            }
            url = hf_hub_url(self.repo, key, revision=self.commit)
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                return memoryview(answer.read()) if answer.status_code == 206 else None

        data = translate_errors(self.repo, key, request)
        return None if data is None or len(data) != num_bytes else data

    @override
    def read_start(self, key: str, *, num_bytes: int) -> tuple[memoryview, int]:
        whole = self.num_bytes(key)
        return self.read_range(key, offset=0, num_bytes=min(num_bytes, whole)), whole

    @override
    def read_forward(
        self, key: str, *, offset: int, num_bytes: int, start: int, stop: int
    ) -> memoryview:
        return self.read_range(key, offset=offset, num_bytes=num_bytes)

    @override
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return [
            self.read_range(key, offset=offset, num_bytes=num_bytes) for offset, num_bytes in ranges
        ]

    @override
    def num_bytes(self, key: str) -> int:
        return self._file(key).num_bytes

    @override
    def identity(self, key: str) -> str:
        file = self._file(key)
        return f"{file.num_bytes}:{self.commit}"

    @override
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        long_ago = datetime(1970, 1, 1, tzinfo=timezone.utc)
        for name, file in self.files.items():
            if not prefix or name.startswith(prefix.rstrip("/") + "/"):
                yield Listed(name, file.num_bytes, long_ago)

    def _refuse(self) -> StoreError:
        return StoreError(
            f"{self.uri}: a repository of the hub is only read. Write to a folder or bucket, then"
            " use 'mmerge push'"
        )

    @override
    def put(self, key: str, data: bytes) -> None:
        raise self._refuse()

    @override
    def put_new(self, key: str, data: bytes) -> None:
        raise self._refuse()

    @override
    def delete(self, key: str) -> None:
        raise self._refuse()

    @override
    def open_writer(self, key: str) -> ObjectWriter:
        raise self._refuse()
