"""An encoder of a user's own, registered for a modality that transformers knows nothing of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from architectures import write_family
from safetensors.torch import load_file, save_file
from torch import nn

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.pipeline import Part, load_composite, make_plan, read_recipe, run
from mmerge.workers.modalities import encoders, processor_inputs
from mmerge.workers.modalities.encoders import EncoderRequest, register_encoder

HIDDEN = 32


class PointEncoder:
    """A PointNet in small: each point through an MLP, the largest of each group, a projection."""

    modality = "point"

    def __init__(self, request: EncoderRequest) -> None:
        self.first, self.second = (
            request.state["points.mlp.weight"],
            request.state["points.connector.weight"],
        )
        self.request = request

    def encode(self, part: Part) -> torch.Tensor:
        points = torch.from_numpy(np.asarray(part.value, dtype=np.float32))
        if points.ndim != 2 or points.shape[1] != 3 or len(points) % 4:
            raise PromptError(
                f"a point cloud has shape {tuple(points.shape)}; give (points, 3), a multiple of 4"
                " points"
            )
        groups = nn.functional.relu(points @ self.first.T).reshape(4, -1, 8).amax(dim=1)
        return groups @ self.second.T


@pytest.fixture
def uri(tmp_path: Path) -> str:
    write_family(tmp_path, "llama", experts=("image", "point"))
    path = tmp_path / "point" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    own = {
        "points.mlp.weight": torch.randn(8, 3, generator=generator),
        "points.connector.weight": torch.randn(HIDDEN, 8, generator=generator),
    }
    save_file(load_file(path) | own, path, metadata={"format": "pt"})
    experts = {name: {"path": name, "modality": name} for name in ("image", "point")}
    recipe = {
        "name": "tiny",
        "base": "base",
        "method": "mmer",
        "output": "store",
        "experts": experts,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run(make_plan(read_recipe(tmp_path / "recipe.yaml")))
    return str(tmp_path / "store")


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_makers", {})


def test_a_registered_encoder_gets_the_carried_tensors_and_its_tokens_are_of_its_modality(
    uri: str,
) -> None:
    register_encoder("point", PointEncoder)
    composite = load_composite(uri)
    cloud = np.random.default_rng(0).normal(size=(16, 3))
    embeds, ids = composite.embed([Part.text("w5"), Part("point", cloud), Part.text("w6")])
    assert ids.tolist() == [-1, 1, 1, 1, 1, -1]
    request = EncoderRequest(
        "point",
        "point",
        {},
        load_file(Path(uri).parent / "point" / "model.safetensors"),
        HIDDEN,
        torch.float32,
        torch.device("cpu"),
    )
    torch.testing.assert_close(embeds[1:5], PointEncoder(request).encode(Part("point", cloud)))
    assert composite.generate(
        [Part("point", cloud), Part.text("w6")], max_new_tokens=3, min_new_tokens=3
    )
    with pytest.raises(PromptError, match=r"a point cloud has shape \(5, 3\)"):
        composite.generate([Part("point", np.zeros((5, 3)))])


def test_what_a_registered_encoder_returns_is_checked(uri: str) -> None:
    class Wrong:
        modality = "point"

        def encode(self, part: Part) -> Any:
            return torch.zeros(3, 7)

    register_encoder("point", lambda request: Wrong())
    with pytest.raises(
        PromptError,
        match=(
            r"the encoder registered for 'point' returned \(3, 7\), expected embeddings \[tokens,"
            r" 32\]"
        ),
    ):
        load_composite(uri).embed([Part("point", None)])
    register_encoder("point", lambda request: object())  # type: ignore[arg-type, return-value]
    with pytest.raises(
        CheckpointError, match="the encoder registered for 'point' has no method 'encode'"
    ):
        load_composite(uri)


@pytest.mark.parametrize(
    ("message", "extra"),
    [
        ("\nX requires the Torchvision library but it was not found", "image"),
        ("`torchaudio` is required", "audio"),
        ("Package `num2words` is required to run SmolVLM processor.", "image"),
    ],
)
def test_the_extra_of_a_package_that_a_processor_lacks_is_named(
    message: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(folder: str, *, owner: str) -> None:
        raise ImportError(message)

    monkeypatch.setitem(processor_inputs._INPUTS, "smolvlm", lack)
    with pytest.raises(CheckpointError, match=rf"Install 'mmerge\[{extra}\]'"):
        processor_inputs.open_inputs("smolvlm", {}, owner="expert 'one'")
    monkeypatch.setitem(processor_inputs._INPUTS, "smolvlm", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError, match=r"\(division by zero\)$"):
        processor_inputs.open_inputs("smolvlm", {}, owner="expert 'one'")
