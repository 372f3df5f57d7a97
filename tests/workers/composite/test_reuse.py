"""A composite that is loaded beside another shares the tensors that both builds have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPERTS, build, write_family

from mmerge.manifests.errors import PlacementError
from mmerge.pipeline import Composite, Part, load_composite

PROMPT = [
    Part.text("w5 w6"),
    Part("image", torch.randn(5, 32, generator=torch.Generator().manual_seed(1))),
    Part.text("w7"),
]


def make_build(folder: Path, **changes: Any) -> str:
    """Return the URI of a build over the same checkpoints with other parameters."""
    recipe = {
        "method": "mmer",
        "density": 0.7,
        "experts": {name: {"path": name, "modality": name} for name in EXPERTS},
    }
    return build(folder, recipe | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reuse")
    write_family(made, "llama")
    return made


def storages(composite: Composite) -> set[int]:
    model = composite.language_model
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize("policy", ["packed", "resident"])
def test_a_composite_of_the_same_build_reads_nothing_of_its_language_model_again(
    folder: Path, policy: Any
) -> None:
    uri = make_build(folder)
    first = load_composite(uri, policy=policy)
    second = load_composite(uri, policy=policy, reuse=first)
    assert second.load_reports[0].bytes_read < first.load_reports[0].bytes_read / 20
    weights = {p.data_ptr() for p in first.language_model.parameters()}
    assert {p.data_ptr() for p in second.language_model.parameters()} == weights
    assert torch.equal(first.logits(PROMPT), second.logits(PROMPT))


def test_what_another_build_changes_is_read_and_the_rest_is_shared(folder: Path) -> None:
    old = load_composite(make_build(folder))
    before = old.logits(PROMPT)
    changed = make_build(folder, mask_scale=[{"value": 0.3, "layers": [0, 0]}, {"value": 0.75}])
    alone = load_composite(changed)
    beside = load_composite(changed, reuse=old)
    assert torch.equal(beside.logits(PROMPT), alone.logits(PROMPT))
    assert not torch.equal(beside.logits(PROMPT), before)
    assert torch.equal(old.logits(PROMPT), before)
    assert storages(beside) & storages(old)
    assert storages(beside) - storages(old)
    whole = alone.load_reports[0].bytes_read
    assert 0 < beside.load_reports[0].bytes_read < 0.8 * whole


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float32}, {"policy": "resident"}, {"mode": "retention"}]
)
def test_tensors_of_another_form_are_not_shared(folder: Path, options: Any) -> None:
    uri = make_build(folder)
    old = load_composite(uri)
    options = options | ({"expert": "image"} if "mode" in options else {})
    beside = load_composite(uri, reuse=old, **options)
    alone = load_composite(uri, **options)
    assert torch.equal(beside.logits(PROMPT), alone.logits(PROMPT))


def test_tensors_are_not_shared_between_devices(folder: Path) -> None:
    uri = make_build(folder)
    old = load_composite(uri)
    assert old.loaded is not None
    old.loaded.device = torch.device("meta")
    with pytest.raises(PlacementError, match="the other is on meta"):
        load_composite(uri, reuse=old)
