"""The description of the format and its schema agree with the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mmerge.manifests.format.manifest import Manifest, make_manifest_schema, to_manifest_bytes
from mmerge.manifests.format.table import SCHEMA
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
