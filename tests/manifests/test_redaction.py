"""Secrets in URLs never reach a message."""

from __future__ import annotations

import pytest

from mmerge.manifests.errors import StoreError
from mmerge.manifests.redaction import has_user_info, redact

HOLDERS = (
    "s3://user:hunter2@bucket/path",
    "http://hunter2@host:9000",
    "https://user:hunter2@host/x@y",
    "s3://AKIA:abc/hunter2+x=@bucket/path",
    "https://host/x?sv=1&sig=hunter2&se=2",
    "https://host/x?X-Amz-Signature=hunter2",
    "abfss://c@acc/x?access_token=hunter2 and more",
    "Authorization: Bearer hunter2",
    "'authorization': 'Basic hunter2'",
    "error sending request for url (http://admin:hunter2@10.0.0.1:9000/bucket?list-type=2)",
)


@pytest.mark.parametrize("text", HOLDERS)
def test_a_secret_is_removed_from_text_and_from_errors(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert "***" in redact(text)
    assert "hunter2" not in str(StoreError(f"{text}: cannot be opened"))
    assert "hunter2" not in repr(StoreError(f"{text}: cannot be opened"))


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/repo@main: not found",
        "/data/a@b/c: no such folder",
        "http://host:8265/jobs: no dashboard answers",
        "s3://bucket/path?x=1",
        "basic configuration of a bearer token",
        "name@latest, key=value",
    ],
)
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_user_name_before_a_host_is_recognised() -> None:
    assert has_user_info("s3://user@bucket/x")
    assert not has_user_info("s3://bucket/x@y")
    assert not has_user_info("hf://org/repo@main")
