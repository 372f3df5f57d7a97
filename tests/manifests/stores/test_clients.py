"""How a URI and the environment become a client: no credentials in URIs, profiles, time limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmerge.manifests.errors import StoreError
from mmerge.manifests.stores.clients import make_client, read_aws_profile, read_limits

CREDENTIALS = """
[default]
aws_access_key_id = A
aws_secret_access_key = S
[empty]
"""
CONFIG = """
[default]
region = eu-west-1
[profile other]
aws_access_key_id = B
aws_secret_access_key = T
endpoint_url = http://localhost:1
s3 =
    addressing_style = virtual
"""


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("s3://key:secret@bucket/x", "credentials and endpoint come from the environment"),
        ("s3://bucket/x?endpoint=y", "a bucket and a path only"),
        ("s3:///x", "expected s3://BUCKET/PATH"),
        ("gs://bucket/../other", "expected gs://BUCKET/PATH"),
    ],
)
def test_a_uri_holds_no_credentials_and_no_options(uri: str, match: str) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        make_client(uri)
    assert "secret@" not in str(caught.value)


@pytest.fixture
def aws_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    (tmp_path / "config").write_text(CONFIG)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def test_keys_region_and_endpoint_come_from_the_standard_files_of_aws(
    aws_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = read_aws_profile()
    keys = options.pop("credential_provider")()
    assert (keys["access_key_id"], keys["secret_access_key"]) == ("A", "S")
    assert options == {"region": "eu-west-1"}
    monkeypatch.setenv("AWS_PROFILE", "other")
    options = read_aws_profile()
    keys = options.pop("credential_provider")()
    assert (keys["access_key_id"], keys["secret_access_key"]) == ("B", "T")
    assert options == {"endpoint": "http://localhost:1", "virtual_hosted_style_request": True}
    assert make_client("s3://bucket/x").config["endpoint"] == "http://localhost:1"


def test_the_environment_goes_before_a_profile(
    aws_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:2")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert "region" not in read_aws_profile()
    assert make_client("s3://bucket/x").config["endpoint"] == "http://localhost:2"


def test_an_unknown_or_damaged_profile_is_named(
    aws_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(StoreError, match=r"AWS_PROFILE: .*\(none\) could not be found"):
        read_aws_profile()
    (aws_files / "config").write_text("no section")
    monkeypatch.delenv("AWS_PROFILE")
    with pytest.raises(StoreError, match=r"AWS_PROFILE: Unable to parse config file"):
        read_aws_profile()


def test_without_boto3_only_a_named_profile_is_an_error(
    aws_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    assert read_aws_profile() == {}
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StoreError, match="profile 'other' is read by boto3: pip install boto3"):
        read_aws_profile()


def test_limits_come_from_the_environment_and_must_be_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "2.5")
    assert read_limits().request_seconds == 2.5
    for bad in ("0", "-1", "soon", "inf"):
        monkeypatch.setenv("MMERGE_RETRY_TIMEOUT", bad)
        with pytest.raises(StoreError, match="MMERGE_RETRY_TIMEOUT: expected seconds"):
            read_limits()
