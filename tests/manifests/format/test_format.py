"""The public description of the format is the format: the schema that is checked in, and the limits
of a URI.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mmerge.manifests.errors import StoreError
from mmerge.manifests.format.manifest import Manifest, make_manifest_schema, to_manifest_bytes
from mmerge.manifests.format.table import SCHEMA
from mmerge.manifests.stores.clients import make_client, read_aws_profile, read_limits
from mmerge.pipeline import make_plan, read_recipe, run


def test_the_schema_that_is_checked_in_is_that_of_the_models(repository: Path) -> None:
    text = (repository / "manifests" / "manifest.schema.json").read_text()
    assert text == json.dumps(make_manifest_schema(), indent=2, ensure_ascii=False) + "\n", (
        "write it anew: see manifests/FORMAT.md"
    )


def test_a_manifest_that_was_written_fits_the_schema_and_a_changed_one_does_not(
    lab: Any, repository: Path
) -> None:
    schema = json.loads((repository / "manifests" / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    report = run(make_plan(read_recipe(lab.write_recipe(lab.make_all()))))
    assert report.manifest is not None
    raw = json.loads(to_manifest_bytes(report.manifest))
    jsonschema.validate(raw, schema)
    assert Manifest.model_validate(raw) == report.manifest
    for change in ({"version": 2}, {"invented": 1}, {"kind": "soup"}, {"build": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw | change, schema)


def test_the_description_names_every_field_of_manifest_and_table(repository: Path) -> None:
    text = (repository / "manifests" / "FORMAT.md").read_text()
    schema = make_manifest_schema()
    fields = {
        *schema["properties"],
        *(name for part in schema["$defs"].values() for name in part["properties"]),
        *SCHEMA.names,
    }
    assert not [name for name in sorted(fields) if f"`{name}`" not in text]


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("s3://key:secret@bucket/x", "credentials and endpoint come from the environment"), ("s3://bucket/x?endpoint=y", "a bucket and a path only"),
        ("ftp://host/x", "unknown scheme 'ftp'"), ("s3:///x", "expected s3://BUCKET/PATH"), ("gs://bucket/../other", "expected gs://BUCKET/PATH"),
    ],
)  # fmt: skip
def test_a_uri_holds_no_credentials_and_only_known_schemes(uri: str, match: str) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        make_client(uri)
    assert "secret@" not in str(caught.value)


def test_keys_region_and_endpoint_come_from_the_standard_files_of_aws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = S\n[role]\nrole_arn ="
        " arn:x\n[empty]\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile other]\naws_access_key_id ="
        " B\naws_secret_access_key = T\nendpoint_url = http://localhost:1\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert read_aws_profile() == {
        "access_key_id": "A",
        "secret_access_key": "S",
        "region": "eu-west-1",
    }
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert read_aws_profile() == {
        "access_key_id": "B",
        "secret_access_key": "T",
        "endpoint": "http://localhost:1",
    }
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(StoreError, match="profile 'none' is in neither"):
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
