"""Stored objects keep their digests, and stores of an earlier version stay readable."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from build_digests import (
    LAB_RECIPES,
    SYNTHETIC,
    WHOLE_MATRIX,
    lab_digests,
    make_checkpoints,
    synthetic_digests,
)

from mmerge.pipeline import make_plan, parse_recipe, run, verify

DATA = Path(__file__).parent / "data"
COMMITTED = json.loads((DATA / "build_digests.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digests")
    make_checkpoints(path)
    return path


@pytest.fixture(scope="module")
def old_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store written by version 0.1 before its redesign.

    It has builds of `make_checkpoints` by mmer, emr and ties.
    """
    path = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / "store-0.1.tar.gz") as archive:
        archive.extractall(path, filter="data")
    return path / "store"


def test_every_reference_build_has_a_committed_digest() -> None:
    assert COMMITTED["lab"].keys() == set(LAB_RECIPES)
    assert COMMITTED["synthetic"].keys() == SYNTHETIC.keys()


@pytest.mark.parametrize("name", LAB_RECIPES)
def test_builds_of_the_lab_keep_their_digests(name: str, tmp_path: Path) -> None:
    assert lab_digests(name, tmp_path / "store") == COMMITTED["lab"][name]


@pytest.mark.parametrize("title", SYNTHETIC)
def test_a_build_of_each_method_keeps_its_digests(title: str, folder: Path) -> None:
    digests, committed = synthetic_digests(title, folder), dict(COMMITTED["synthetic"][title])
    if title in WHOLE_MATRIX:
        # Singular vectors differ in their last bits between processors; names do not.
        del digests["contents"], committed["contents"]
    assert digests == committed


@pytest.mark.parametrize("method", ["mmer", "emr", "ties"])
def test_a_build_of_an_earlier_version_is_verified_and_reused(
    method: str, old_store: Path, folder: Path
) -> None:
    verify(f"{old_store}#{method}").check()
    names = ("image", "audio", "video")
    experts = {name: {"path": name, "modality": name} for name in names}
    raw = {
        "name": method,
        "base": "base",
        "method": method,
        "output": str(old_store),
        "experts": experts,
    }
    report = run(make_plan(parse_recipe(raw, folder=folder)))
    assert not report.is_new
    assert not report.num_computed.get("merge")


def test_tensors_of_an_earlier_version_are_read_bit_for_bit(
    old_store: Path, folder: Path, tmp_path: Path
) -> None:
    from mmerge.workers.reconstruction.build_reader import BuildReader
    from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

    experts = {name: {"path": name, "modality": name} for name in ("image", "audio", "video")}
    for method in ("mmer", "emr"):
        raw = {
            "name": method,
            "base": "base",
            "method": method,
            "output": str(tmp_path / "new"),
            "experts": experts,
        }
        run(make_plan(parse_recipe(raw, folder=folder)))
        old, new = BuildReader(f"{old_store}#{method}"), BuildReader(f"{tmp_path / 'new'}#{method}")
        assert old.names("delta") == new.names("delta")
        for name in old.names("delta"):
            assert torch.equal(text_weight(old, name), text_weight(new, name))
            for expert in experts:
                assert torch.equal(
                    rebuild_weight(old, name, expert=expert),
                    rebuild_weight(new, name, expert=expert),
                )
