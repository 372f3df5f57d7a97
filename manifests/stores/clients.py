"""Clients of the obstore library for `s3://`, `gs://` and `az://`, with limits on time and retries.

Credentials, endpoint, region and path style come from the environment or from the vendor's own
files, never from a URI, a recipe or a manifest. The library reads the environment, Google's
application default credentials and the metadata servers; profiles of AWS are read by boto3.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import from_url

from mmerge.manifests.errors import StoreError, first_line

REQUEST_TIMEOUT_VARIABLE = "MMERGE_REQUEST_TIMEOUT"
RETRY_TIMEOUT_VARIABLE = "MMERGE_RETRY_TIMEOUT"
CONNECT_TIMEOUT_SECONDS = 10.0
MAX_RETRIES = 8
_S3_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
"""The variable that moves each standard file of AWS, and the file's name in `~/.aws`."""

_from_url: Any = from_url  # its overloads list every vendor's options


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds: of one request with its body, and of all retries of one request."""

    request_seconds: float = 60.0
    retry_seconds: float = 60.0


def read_limits() -> Limits:
    """Return the limits that the environment sets, or the defaults.

    The variables are MMERGE_REQUEST_TIMEOUT and MMERGE_RETRY_TIMEOUT, in seconds.

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


def make_client(uri: str) -> Any:
    """Return the library's store for a URI; nothing is requested from the server yet.

    Raises:
        StoreError: the URI holds credentials or options, or the configuration does not fit.
    """
    scheme = _check_uri(uri)
    limits = read_limits()
    options = _make_s3_options() if scheme == "s3" else {}
    endpoint = str(options.get("endpoint") or read_endpoint(scheme))
    client_options = {
        "timeout": timedelta(seconds=limits.request_seconds),
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_SECONDS, limits.request_seconds)),
        "allow_http": endpoint.startswith("http://"),
    }
    # The pauses between retries are random and grow from `init_backoff`.
    retry_config = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(seconds=limits.retry_seconds),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    try:
        return _from_url(uri, client_options=client_options, retry_config=retry_config, **options)
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{uri}: cannot be opened ({first_line(error)}). Set the credentials in the"
            " environment (docs/storage.md)"
        ) from error


def _check_uri(uri: str) -> str:
    """Return the scheme of a URI that has a bucket and a path only. Raises StoreError."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise StoreError(f"{uri}: is no URI ({error})") from error
    scheme = parts.scheme.lower()
    if "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
        # Without what may be a secret.
        where = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise StoreError(
            f"{where}: a URI holds a bucket and a path only; credentials and endpoint come from the"
            " environment"
        )
    if not parts.netloc or ".." in parts.path.split("/"):
        raise StoreError(f"{uri}: expected {scheme}://BUCKET/PATH")
    return scheme


def read_endpoint(scheme: str) -> str:
    """Return the endpoint that the environment sets, empty for the vendor's own."""
    if scheme == "s3":
        values = (os.environ.get(name, "") for name in _S3_ENDPOINT_VARIABLES)
        return next((value for value in values if value), "")
    if scheme == "az":
        if os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true", "yes"):
            return "http://emulator"
        return os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
    return os.environ.get("STORAGE_EMULATOR_HOST", "")


def _make_s3_options() -> dict[str, Any]:
    """Return what the library does not read from the environment: profiles, and how to sign."""
    options: dict[str, Any] = {}
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        options = read_aws_profile()
    environment_endpoint = read_endpoint("s3")
    if environment_endpoint:
        options["endpoint"] = environment_endpoint
    endpoint = str(options.get("endpoint", ""))
    if not endpoint.startswith("http://") and "AWS_UNSIGNED_PAYLOAD" not in os.environ:
        # TLS protects a body already; hashing it once more costs a third of the speed.
        options["unsigned_payload"] = True
    return options


def read_aws_profile() -> dict[str, Any]:
    """Return credentials, region, endpoint and path style of an AWS profile, as boto3 finds them.

    The profile is AWS_PROFILE or `default`. Without AWS_PROFILE, and without boto3 or the standard
    files, the result is empty: the library then asks the roles of container and instance.

    Raises:
        StoreError: AWS_PROFILE is set, but boto3 is not installed or does not know the profile; or
            a file cannot be read.
    """
    profile = os.environ.get("AWS_PROFILE")
    if not profile and not _has_aws_files():
        return {}
    try:
        import botocore.exceptions  # type: ignore[import-untyped, import-not-found, unused-ignore]
        import botocore.session  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if not profile:
            return {}
        raise StoreError(
            f"AWS_PROFILE: profile {profile!r} is read by boto3: pip install boto3, or set"
            " AWS_ACCESS_KEY_ID"
        ) from error
    session = botocore.session.Session(profile=profile)
    try:
        config = session.get_scoped_config()
        has_credentials = session.get_credentials() is not None
    except botocore.exceptions.BotoCoreError as error:
        raise StoreError(f"AWS_PROFILE: {error}. Choose another profile") from error
    options: dict[str, Any] = {}
    if has_credentials:
        options["credential_provider"] = Boto3CredentialProvider(session)
    if "region" in config and not _is_any_set("AWS_REGION", "AWS_DEFAULT_REGION"):
        options["region"] = config["region"]
    if "endpoint_url" in config:
        options["endpoint"] = config["endpoint_url"]
    if "virtual" in str(config.get("s3", "")):
        options["virtual_hosted_style_request"] = True
    return options


def _has_aws_files() -> bool:
    paths = (
        Path(os.environ.get(variable) or Path.home() / ".aws" / name)
        for variable, name in _AWS_FILES.items()
    )
    return any(path.is_file() for path in paths)


def _is_any_set(*variables: str) -> bool:
    return any(os.environ.get(variable) for variable in variables)
