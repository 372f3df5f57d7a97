"""Errors of the obstore library as store errors, which name store and key.

The class of the result says whether asking again can help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotFoundError

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError, StoreUnavailable

METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal", "fd00:ec2::254")
"""Where a cloud machine requests credentials, after the environment and the vendor's files. A
failing request to one of them means that no credentials were set.
"""
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS to a file of credentials",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


@contextmanager
def translate_errors(uri: str, key: str) -> Iterator[None]:
    """Raise store errors in place of the library's within the context; messages name `key`.

    Raises:
        NotFound, AlreadyExists: as the names say.
        StoreUnavailable: the server did not answer, or failed; asking again can help.
        StoreError: anything else.
    """
    where = f"{uri}: {key}" if key else uri
    try:
        yield
    except StoreError:
        raise
    except (NotFoundError, FileNotFoundError) as error:
        raise NotFound(f"{where}: not found") from error
    except (AlreadyExistsError, FileExistsError) as error:
        if _is_conflict(error, scheme=uri.partition("://")[0].lower()):
            raise StoreUnavailable(
                f"{where}: another request for this object was under way"
            ) from error
        raise AlreadyExists(f"{where}: already exists") from error
    except (BaseError, OSError, ValueError) as error:
        raise _translate(error, where=where, scheme=uri.partition("://")[0]) from error


def _translate(error: Exception, *, where: str, scheme: str) -> StoreError:
    if any(server in str(error) for server in METADATA_SERVERS):
        variables = _CREDENTIALS.get(scheme.lower(), "them")
        return StoreError(
            f"{where}: the environment holds no credentials. Set {variables} (docs/storage.md)"
        )
    # The library's streaming writer raises bare OSErrors for what its requests end with.
    is_of_writer = isinstance(error, OSError) and error.errno is None
    is_transient = is_of_writer or isinstance(error, (GenericError, ConnectionError, TimeoutError))
    kind = StoreUnavailable if is_transient and not _is_refusal(error) else StoreError
    return kind(f"{where}: {first_line(error)}")


def _is_conflict(error: Exception, *, scheme: str) -> bool:
    """Return whether a server gave up a request because of a concurrent one for the same object.

    The library takes every status 409 for an existing object. On S3 and Google Cloud Storage that
    is status 412, and 409 (ConditionalRequestConflict) says only that the request lost a race,
    which nobody may have won. Azure has 409 for both, and a code that tells them apart.
    """
    text = str(error)
    if not re.search(r"status code: 409|[Ss]tatus:? 409", text):
        return False
    return scheme != "az" or ("<Code>" in text and "AlreadyExists</Code>" not in text)


def _is_refusal(error: Exception) -> bool:
    """Return whether a server understood and refused (permission, a range beyond the end)."""
    status = re.search(r"[Ss]tatus:? (4\d\d)", str(error))
    return "nvalid" in first_line(error) or (status is not None and status[1] not in ("408", "429"))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = Exception.__str__(error)
    return text.splitlines()[0] if text else type(error).__name__
