"""Helpers for test servers: a free port, waiting, ending by pid, an S3 bucket."""

from __future__ import annotations

import http.client
import socket
import subprocess
import time
from contextlib import suppress


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(
    port: int, *, seconds: float = 90, process: subprocess.Popen[bytes] | None = None
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def s3_environment(endpoint: str, *, key: str = "AK", secret: str = "SK") -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_bucket(environment: dict[str, str], name: str) -> None:
    """Create a bucket with the one request that the library has no verb for."""
    import obstore
    from obstore.store import S3Store

    root = S3Store(
        name,
        endpoint=environment["AWS_ENDPOINT_URL"],
        access_key_id=environment["AWS_ACCESS_KEY_ID"],
        secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        client_options={"allow_http": True},
    )
    from datetime import timedelta

    url = obstore.sign(root, "PUT", "x", timedelta(seconds=60)).partition("?")[0].rpartition("/")[0]
    _put_bucket(url, environment)


def _put_bucket(url: str, environment: dict[str, str]) -> None:
    from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
    from botocore.credentials import Credentials  # type: ignore[import-untyped]

    request = AWSRequest(method="PUT", url=url)
    request.headers["x-amz-content-sha256"] = (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    SigV4Auth(
        Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]),
        "s3",
        "us-east-1",
    ).add_auth(request)
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("PUT", "/" + path, headers=dict(request.headers))
    answer = connection.getresponse()
    if answer.status not in (200, 409):
        raise RuntimeError(f"bucket {path}: {answer.status} {answer.read()[:200]!r}")
    connection.close()
