"""Published mergekit YAMLs give what mergekit 0.1.5 wrote, or are refused with the reason.

`benchmarks/peer_yamls.py` runs mergekit on the same files, and stores what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.exports.checkpoint import export
from tests.published_yamls import (
    FEATURES,
    PUBLISHED,
    asks_for_tokens,
    count_units,
    make_models,
    make_table,
    read_output,
    to_compared,
)

YAMLS = {**PUBLISHED, **FEATURES}
GOLDEN = Path(__file__).parents[2] / "data" / "mergekit-yamls.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    make_models(folder)
    return folder


def write_yaml(folder: Path, label: str, config: Mapping[str, Any]) -> Path:
    number = list(YAMLS).index(label)
    path = folder / f"{number}-{len(list(folder.glob('*.yml')))}.yml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


@pytest.mark.parametrize("label", [label for label, item in YAMLS.items() if item.is_merged])
def test_a_yaml_gives_what_mergekit_wrote(label: str, models: Path) -> None:
    config = to_compared(YAMLS[label])
    path = write_yaml(models, label, config)
    run(make_plan(read_recipe(path)))
    export(str(models / f"{path.stem}-composite"), models / f"{path.stem}-export")
    with_tokens = asks_for_tokens(config)
    output = read_output(models / f"{path.stem}-export", with_tokens=with_tokens)
    with safe_open(GOLDEN, framework="pt") as golden:
        theirs: torch.Tensor = golden.get_tensor(label)
        facts = json.loads(golden.metadata()[label])
    assert output.facts == facts
    assert output.entries.dtype == theirs.dtype
    assert count_units(output.entries, theirs) <= 1


@pytest.mark.parametrize("label", [label for label, item in YAMLS.items() if item.compared])
def test_a_yaml_with_random_numbers_is_planned_as_published(label: str, models: Path) -> None:
    plan = make_plan(read_recipe(write_yaml(models, label, YAMLS[label].config)))
    assert plan.num_parameters > 0


@pytest.mark.parametrize("label", [label for label, item in YAMLS.items() if item.refusal])
def test_a_yaml_that_is_not_merged_is_refused_with_the_reason(label: str, models: Path) -> None:
    path = write_yaml(models, label, YAMLS[label].config)
    with pytest.raises(MmergeError, match=YAMLS[label].refusal):
        make_plan(read_recipe(path))


def test_a_file_of_several_documents_is_refused_with_a_way_out(models: Path) -> None:
    path = models / "several.yml"
    document = "merge_method: linear\nmodels:\n- model: m1\n  parameters: {weight: 1}\n"
    path.write_text(f"{document}---\n{document}")
    with pytest.raises(
        MmergeError, match=r"several YAML documents \(found another document in line 5\)"
    ):
        read_recipe(path)
    path.write_text(f"---\n{document}...\n")
    assert read_recipe(path).method == "linear"


def test_the_page_has_the_result_of_every_file(repository: Path) -> None:
    assert make_table() in (repository / "docs" / "mergekit.md").read_text()
