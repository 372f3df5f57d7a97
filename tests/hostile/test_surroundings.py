"""What fails around a command: the Hub, a decomposition, a mergekit YAML that is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from mmerge.pipeline.execution.jobs import to_absolute
from mmerge.pipeline.recipes.parsing import parse_recipe, read_recipe

RECIPE = (
    "name: x\nbase: base\nmethod: iso_c\noutput: store\nexperts:\n"
    "  image: {path: image, modality: image}\n  audio: {path: audio, modality: audio}\n"
)


def test_a_hub_that_does_not_answer_is_one_message(
    folder: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (folder / "r.yaml").write_text(RECIPE.replace("base: base", "base: hf://org/repo"))
    assert "the hub does not answer" in refuse("plan", folder / "r.yaml")


def test_a_decomposition_that_does_not_converge_names_the_tensor(
    folder: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("linalg.svd: failed to converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fail)
    (folder / "r.yaml").write_text(RECIPE)
    err = refuse("run", folder / "r.yaml", "--executor", "serial")
    assert "_proj.weight: the decomposition of its task vectors does not converge" in err


def test_a_mergekit_yaml_is_submitted_as_the_recipe_that_it_stands_for(folder: Path) -> None:
    path = folder / "mk.yaml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "  - model: image\n    parameters: {weight: 0.5}\n"
        "  - model: audio\n    parameters: {weight: 0.25}\ndtype: bfloat16\n"
    )
    recipe = read_recipe(path)
    sent = yaml.safe_load(to_absolute(path, recipe))
    assert parse_recipe(sent, folder=Path("/nowhere")) == recipe
    assert [expert["path"] for expert in sent["experts"].values()] == [
        str(folder / "image"),
        str(folder / "audio"),
    ]
