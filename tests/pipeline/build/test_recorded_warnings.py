"""Warnings of a plan in the manifest of its build, beside what the digest covers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmerge.manifests.format.manifest import Manifest, manifest_key
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import RunReport, make_plan, read_recipe, run
from mmerge.pipeline.views.build_report import print_build
from mmerge.pipeline.views.build_summary import read_build

LINE = (
    "expert 'image': has a chat template, the base has none. A merged model has the base's; a"
    " composite formats prompts of that expert's inputs by its own, unless the recipe has a"
    " 'template' or 'chat_template_from'"
)


@pytest.fixture
def recipe(lab: Any) -> Path:
    raw = lab.make_all()
    (lab.folder / "image" / "chat_template.jinja").write_text("one")
    (lab.folder / "audio" / "tokenizer.json").write_text("{")
    path: Path = lab.write_recipe(raw)
    return path


def build(recipe: Path) -> RunReport:
    return run(make_plan(read_recipe(recipe)))


def read(report: RunReport) -> tuple[Path, dict[str, Any]]:
    store = open_store(report.uri.partition("#")[0])
    path = Path(store.uri) / manifest_key(report.build)
    return path, json.loads(path.read_bytes())


def test_a_manifest_records_the_warnings_and_show_prints_them(lab: Any, recipe: Path) -> None:
    report = build(recipe)
    manifest: Manifest = read_build(report.uri).manifest
    assert manifest.warnings is not None
    assert LINE in manifest.warnings.lines
    assert any(
        line.startswith("expert 'audio': tokenizer.json") for line in manifest.warnings.lines
    )
    assert str(lab.folder) not in "".join(manifest.warnings.lines)
    console = Console(width=300, record=True, file=io.StringIO())
    print_build(read_build(report.uri), console, layers=False)
    assert f"warning: {LINE}" in console.export_text()


def test_a_build_of_a_version_without_warnings_stays_as_it_is(recipe: Path) -> None:
    report = build(recipe)
    path, raw = read(report)
    del raw["warnings"]
    path.write_text(json.dumps(raw))
    before = path.read_bytes()
    again = build(recipe)
    assert (again.build, again.is_new, again.repaired) == (report.build, False, ())
    assert run(make_plan(read_recipe(recipe)), fresh=True).repaired == ()
    assert path.read_bytes() == before
    assert not verify(report.uri).damages


def test_a_changed_warning_is_found_and_repaired(recipe: Path) -> None:
    report = build(recipe)
    path, raw = read(report)
    whole = path.read_bytes()
    raw["warnings"]["lines"][0] = "all is well"
    path.write_text(json.dumps(raw))
    problems = verify(report.uri).damages
    assert any("the checksum of its warnings" in problem for problem in problems)
    assert build(recipe).repaired
    assert path.read_bytes() == whole
