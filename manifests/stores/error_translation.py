"""The library's errors as ours: which store and key, and whether asking again can help."""

from __future__ import annotations

import re
from types import TracebackType

from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotFoundError

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError, StoreUnavailable

METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal", "fd00:ec2::254")
"""Where a machine of a cloud asks for credentials, after the environment and the vendor's files:
here as elsewhere the last resort.
"""


class Translated:
    """Turns the library's errors into ours, with store and key in the message."""

    def __init__(self, uri: str, key: str, *, is_remote: bool) -> None:
        self._where = f"{uri}: {key}" if key else uri
        self._is_remote = is_remote

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is None or isinstance(value, StoreError):
            return
        if isinstance(value, (NotFoundError, FileNotFoundError, NotADirectoryError)):
            raise NotFound(f"{self._where}: not found") from value
        if isinstance(value, (AlreadyExistsError, FileExistsError)):
            raise AlreadyExists(f"{self._where}: already exists") from value
        if self._is_remote and any(server in str(value) for server in METADATA_SERVERS):
            raise StoreError(
                f"{self._where}: the environment holds no credentials. {_remedy(self._where)}"
            ) from value
        if (
            self._is_remote
            and isinstance(value, (GenericError, ConnectionError, TimeoutError))
            and not _is_refusal(value)
        ):
            raise StoreUnavailable(f"{self._where}: {first_line(value)}") from value
        if isinstance(value, (BaseError, OSError, ValueError)):
            raise StoreError(f"{self._where}: {first_line(value)}") from value


def _remedy(where: str) -> str:
    scheme = where.partition("://")[0].lower()
    names = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS to a file of credentials",
        "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    }
    return f"Set {names.get(scheme, 'them')} (docs/storage.md)"


def _is_refusal(error: BaseException) -> bool:
    """Return whether a server understood and said no (no permission, a range behind the end):
    asking again changes nothing.
    """
    status = re.search(r"[Ss]tatus:? (4\d\d)", str(error))
    return "nvalid" in first_line(error) or (status is not None and status[1] not in ("408", "429"))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = Exception.__str__(error) if isinstance(error, Exception) else str(error)
    return text.splitlines()[0] if text else type(error).__name__
