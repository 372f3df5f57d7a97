"""From a URI to the library's client: `s3://`, `gs://` and `az://`, with limits on time and
repeats.

Credentials, endpoint, region and path style come from the environment or from the vendor's own
files (for S3 `~/.aws/credentials` and `~/.aws/config`), never from a URI, a recipe or a manifest.
"""

from __future__ import annotations

import configparser
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import from_url

from mmerge.manifests.errors import StoreError

SCHEMES = ("s3", "gs", "az")
"""What lies behind a network and is reached through the library."""
REQUEST_TIMEOUT_VARIABLE = "MMERGE_REQUEST_TIMEOUT"
RETRY_TIMEOUT_VARIABLE = "MMERGE_RETRY_TIMEOUT"
CONNECT_TIMEOUT_SECONDS = 10.0
MAX_RETRIES = 8

_from_url: Any = from_url  # its overloads list every vendor's options one by one
_PROFILE_NEEDS_BOTO3 = (
    "role_arn",
    "sso_session",
    "sso_start_url",
    "credential_process",
    "web_identity_token_file",
)


@dataclass(frozen=True)
class Limits:
    """How long is waited, in seconds: for one request with its body, and for all repeats of one
    request.
    """

    request_seconds: float = 60.0
    retry_seconds: float = 60.0


def read_limits() -> Limits:
    """Return the limits that the environment sets (MMERGE_REQUEST_TIMEOUT, MMERGE_RETRY_TIMEOUT, in
    seconds), or the defaults.

    Raises:
        StoreError: a value is no positive number.
    """
    defaults = Limits()
    return Limits(
        request_seconds=_read_seconds(REQUEST_TIMEOUT_VARIABLE, defaults.request_seconds),
        retry_seconds=_read_seconds(RETRY_TIMEOUT_VARIABLE, defaults.retry_seconds),
    )


def _read_seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise StoreError(f"{variable}: expected seconds, got {text!r}")
    return seconds


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI in lower case, empty for a path."""
    head, colons, _ = uri.partition("://")
    return (
        head.lower()
        if colons and head.replace("+", "").replace("-", "").replace(".", "").isalnum()
        else ""
    )


def make_client(uri: str) -> Any:
    """Return the library's store for an `s3://`, `gs://` or `az://` URI; nothing is asked of the
    server yet.

    Raises:
        StoreError: the scheme is unknown, the URI holds credentials or options, or the
            configuration does not fit.
    """
    scheme = scheme_of(uri)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(
            f"{uri}: unknown scheme {scheme!r}. Use a folder, {known} or (for inputs) hf://"
        )
    parts = urlsplit(uri)
    if "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
        where = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise StoreError(
            f"{where}: a URI holds a bucket and a path only; credentials and endpoint come from the"
            " environment"
        )
    if not parts.netloc or ".." in parts.path.split("/"):
        raise StoreError(f"{uri}: expected {scheme}://BUCKET/PATH")
    limits = read_limits()
    options = _s3_options() if scheme == "s3" else {}
    client = {
        "timeout": timedelta(seconds=limits.request_seconds),
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_SECONDS, limits.request_seconds)),
        "allow_http": _endpoint(scheme, options).startswith("http://"),
    }
    # The library waits a random time that grows from `init_backoff` (exponential backoff with
    # jitter).
    retry = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(seconds=limits.retry_seconds),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    try:
        return _from_url(uri, client_options=client, retry_config=retry, **options)
    except (BaseError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise StoreError(
            f"{uri}: cannot be opened ({first}). Set the credentials in the environment"
            " (docs/storage.md)"
        ) from error


def _endpoint(scheme: str, options: dict[str, Any]) -> str:
    if scheme == "s3":
        named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        return str(
            options.get("endpoint")
            or next((os.environ[name] for name in named if os.environ.get(name)), "")
        )
    if scheme == "az":
        if os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true", "yes"):
            return "http://emulator"
        return os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
    return os.environ.get("STORAGE_EMULATOR_HOST", "")


def _s3_options() -> dict[str, Any]:
    """Return what the library does not read by itself: the standard files of AWS, and how a body is
    signed.
    """
    options: dict[str, Any] = {}
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        options = read_aws_profile()
    endpoint = _endpoint("s3", options)
    if endpoint and "endpoint" not in options:
        options["endpoint"] = endpoint
    if not endpoint.startswith("http://") and "AWS_UNSIGNED_PAYLOAD" not in os.environ:
        # TLS protects a body already; hashing it once more costs a third of the speed.
        options["unsigned_payload"] = True
    return options


def read_aws_profile() -> dict[str, Any]:
    """Return keys, region, endpoint and path style of the profile AWS_PROFILE (or `default`) of the
    standard files of AWS.

    Raises:
        StoreError: AWS_PROFILE names a profile that is in neither file, or one that needs boto3
            where it is not installed.
    """
    name = os.environ.get("AWS_PROFILE") or "default"
    credentials = _read_ini("AWS_SHARED_CREDENTIALS_FILE", "credentials")
    config = _read_ini("AWS_CONFIG_FILE", "config")
    section = name if name == "default" else f"profile {name}"
    found = dict(config[section]) if config.has_section(section) else {}
    found |= dict(credentials[name]) if credentials.has_section(name) else {}
    if not found:
        if os.environ.get("AWS_PROFILE"):
            raise StoreError(
                f"AWS_PROFILE: profile {name!r} is in neither ~/.aws/credentials nor ~/.aws/config"
            )
        return {}
    keys = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    options: dict[str, Any] = {
        ours: found[theirs] for theirs, ours in keys.items() if theirs in found
    }
    if "region" in found and not (
        os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    ):
        options["region"] = found["region"]
    if "endpoint_url" in found and not _endpoint("s3", {}):
        options["endpoint"] = found["endpoint_url"]
    if "addressing_style = virtual" in found.get("s3", ""):
        options["virtual_hosted_style_request"] = True
    if "access_key_id" not in options and any(key in found for key in _PROFILE_NEEDS_BOTO3):
        options["credential_provider"] = _make_boto3_provider(name)
    return options


def _make_boto3_provider(profile: str) -> Any:
    try:
        import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise StoreError(
            f"profile {profile!r} needs boto3 for its credentials: pip install boto3, or set"
            " AWS_ACCESS_KEY_ID"
        ) from error
    return Boto3CredentialProvider(boto3.session.Session(profile_name=profile))


def _read_ini(variable: str, name: str) -> configparser.ConfigParser:
    path = Path(os.environ.get(variable) or Path.home() / ".aws" / name)
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: cannot be read ({type(error).__name__})") from error
    return parser
