"""Repositories of the Hugging Face Hub, to read: `hf://ORG/REPO@REVISION`, pinned to a commit.

A task that needs bytes of a file fetches it whole into the node's cache (HF_HOME), which all tasks
of the node share. Only a range at the start of a file, its header, is read without the rest.
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are those of the huggingface_hub library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import Self, override

from mmerge.manifests.errors import MmergeError, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores.base import (
    MAX_READ_BYTES,
    Listed,
    OnPart,
    ReadableStore,
    check_key,
)
from mmerge.manifests.stores.local_file import LocalFile

MAX_HEAD_BYTES = 128 << 20
"""A larger range at the start of a file is no header: the file is fetched."""
_URI_PATTERN = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?/?"
)
_COMMIT_PATTERN = r"[0-9a-f]{40}"
_NO_TIME = datetime(1970, 1, 1, tzinfo=timezone.utc)
"""Files of a commit have no time of their own."""
_Result = TypeVar("_Result")


def split_hub_uri(uri: str) -> tuple[str, str]:
    """Return repository and revision (`main` if none) of an hf:// URI. Raises StoreError."""
    match = _URI_PATTERN.fullmatch(uri)
    if not match or ".." in uri:
        raise StoreError(f"{uri}: expected hf://ORG/REPO or hf://ORG/REPO@REVISION")
    return match["repo"], match["revision"] or "main"


def make_hub_api() -> Any:
    """Return a client of the Hub, with the token and endpoint of the environment."""
    from huggingface_hub import HfApi

    return HfApi(library_name="mmerge")


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def translate_hub_errors(repo: str, what: str, operation: Callable[[], _Result]) -> _Result:
    """Return the result of `operation`, with store errors in place of the library's.

    Raises:
        NotFound: repository, revision or file is missing.
        StoreUnavailable: the Hub does not answer.
        StoreError: the repository is gated.
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
    except MmergeError:
        raise
    except Exception as error:  # of the library, of its HTTP client, or of the system
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise StoreUnavailable(
            f"{where}: the hub does not answer ({reason}). Check the network and HF_ENDPOINT, or"
            " set HF_HUB_OFFLINE=1 to use the cache"
        ) from error


def _resolve(repo: str, revision: str) -> str:
    """Return the commit of a revision: by the Hub, or offline by what the cache remembers of it."""
    if re.fullmatch(_COMMIT_PATTERN, revision):
        return revision
    if not _is_offline():
        return translate_hub_errors(
            repo,
            revision,
            lambda: str(make_hub_api().resolve_revision(repo, revision=revision).resolved),
        )
    from huggingface_hub import errors

    try:
        resolved = make_hub_api().resolve_revision(repo, revision=revision, local_files_only=True)
    except (errors.RevisionResolutionError, OSError) as error:
        raise StoreUnavailable(
            f"hf://{repo}@{revision}: offline, and the cache does not know this revision. Go online"
            " once, or name a commit"
        ) from error
    return str(resolved.resolved)


class HubStore(ReadableStore):
    """One commit of one repository."""

    def __init__(self, repo: str, commit: str) -> None:
        self.repo, self.commit = repo, commit
        self.uri = f"hf://{repo}@{commit}"

    @classmethod
    @override
    def open(cls, uri: str, *, create: bool) -> Self:
        repo, revision = split_hub_uri(uri)
        return cls(repo, _resolve(repo, revision))

    @classmethod
    @override
    def pin(cls, uri: str) -> str:
        return cls.open(uri, create=False).uri

    @cached_property
    def _file_sizes(self) -> dict[str, int]:
        """Bytes of every file of the commit, by name. Offline: of those in the cache."""
        if _is_offline():
            return self._cached_file_sizes()
        tree = translate_hub_errors(
            self.repo,
            self.commit,
            lambda: list(
                make_hub_api().list_repo_tree(self.repo, revision=self.commit, recursive=True)
            ),
        )
        return {entry.path: entry.size for entry in tree if hasattr(entry, "size")}

    def _cached_file_sizes(self) -> dict[str, int]:
        from huggingface_hub import errors, snapshot_download

        try:
            # With no file requested, the folder of the commit is returned however many it holds.
            folder = snapshot_download(
                self.repo, revision=self.commit, local_files_only=True, allow_patterns=[]
            )
        except errors.LocalEntryNotFoundError as error:
            raise StoreUnavailable(
                f"{self.uri}: offline, and this commit is not in the cache. Go online once"
            ) from error
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}

    @override
    def num_bytes(self, key: str) -> int:
        num_bytes = self._file_sizes.get(check_key(key))
        if num_bytes is None:
            raise NotFound(f"{self.uri}: {key}: not found")
        return num_bytes

    @override
    def identity(self, key: str) -> str:
        return f"{self.num_bytes(key)}:{self.commit}"

    @override
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        for key, num_bytes in self._file_sizes.items():
            if key.startswith(folder):
                yield Listed(key, num_bytes, _NO_TIME)

    def _find_cached(self, key: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, check_key(key), revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def _fetch(self, key: str) -> Path:
        """Return the path of a file in the node's cache; it is downloaded if it is not there."""
        from huggingface_hub import hf_hub_download

        cached = self._find_cached(key)
        if cached is not None:
            return cached
        path = translate_hub_errors(
            self.repo,
            key,
            lambda: hf_hub_download(
                self.repo, check_key(key), revision=self.commit, library_name="mmerge"
            ),
        )
        return Path(path)

    @override
    def open_local_file(self, key: str) -> LocalFile:
        return LocalFile(self._fetch(key), name=f"{self.uri}: {key}")

    @override
    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        self.check_read_size(key, self.num_bytes(key), max_bytes=max_bytes)
        with self.open_local_file(key) as file:
            return bytes(file.read(offset=0, num_bytes=file.num_bytes))

    @override
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        data = self._read_head(key, num_bytes) if offset == 0 else None
        if data is None:
            with self.open_local_file(key) as file:
                data = file.read(offset=offset, num_bytes=num_bytes)
        on_part(data)
        return data

    def _read_head(self, key: str, num_bytes: int) -> memoryview | None:
        """Return the first bytes of a file that is not cached, None where that does not work."""
        if num_bytes > MAX_HEAD_BYTES or _is_offline() or self._find_cached(key) is not None:
            return None
        data = translate_hub_errors(self.repo, key, lambda: self._request_head(key, num_bytes))
        return None if data is None or len(data) != num_bytes else data

    def _request_head(self, key: str, num_bytes: int) -> memoryview | None:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        if num_bytes == 0:
            return memoryview(b"")
        headers = build_hf_headers(library_name="mmerge") | {
            "Range": f"bytes=0-{num_bytes - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo, key, revision=self.commit)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            # A server without ranges sends the whole file, with status 200.
            return memoryview(response.read()) if response.status_code == 206 else None
