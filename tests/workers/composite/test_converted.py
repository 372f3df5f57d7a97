"""Models whose tensors transformers itself renames or fuses (mixtures of experts) load whole, each
byte once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import build_masks, build_plain, make_model
from safetensors.torch import load_file

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import Part, load_composite
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight

PROMPT = [5, 6, 7, 8, 9]


def model_of(state: dict[str, torch.Tensor], folder: Path) -> torch.nn.Module:
    """What transformers itself makes of these tensors and the configuration in a folder."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return transformers.MixtralForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, trust_remote_code=False
    ).eval()


@torch.inference_mode()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits
    return found


def test_a_plain_merge_of_them_is_the_model_of_its_tensors_and_reads_each_byte_once(
    tmp_path: Path,
) -> None:
    uri = build_plain(tmp_path, "mixtral")
    reader = BuildReader(uri)
    names = reader.llm_names()
    files = load_file(tmp_path / "base" / "model.safetensors")
    assert set(names) == set(files) != set(dict(make_model("mixtral").named_parameters())), (
        "files and class name them alike"
    )
    told: list[tuple[int, int]] = []
    composite = load_composite(
        uri, on_bytes=lambda num_bytes, total: told.append((num_bytes, total))
    )
    stored = sum(reader.stored_bytes(name, "merged") for name in names)
    assert (
        composite.load_reports[0].bytes_read
        == stored
        == sum(value.nbytes for value in files.values())
    )
    expected = model_of({name: reader.read(name, "merged") for name in names}, tmp_path / "base")
    assert logits_of(composite.language_model).equal(logits_of(expected))
    assert told[-1] == (stored, stored), "the progress bar ends where the model is whole"
    assert composite.generate([Part.text("w5 w6 w7")], max_new_tokens=3).split()


def test_one_expert_of_a_build_of_masks_of_them_loads_and_all_at_once_are_refused_by_name(
    tmp_path: Path,
) -> None:
    uri = build_masks(tmp_path, "mixtral")
    reader = BuildReader(uri)
    with pytest.raises(
        CheckpointError,
        match=r"base: its tensors do not fit MixtralForCausalLM .* one expert \(retention\)",
    ):
        load_composite(uri)
    composite = load_composite(uri, mode="retention", expert="audio")
    names = reader.llm_names()
    expected = model_of(
        {name: rebuild_weight(reader, name, expert="audio") for name in names}, tmp_path / "base"
    )
    assert logits_of(composite.language_model).equal(logits_of(expected))
    stored = sum(reader.stored_bytes(name, role) for name in names for role in ("base", "delta"))
    assert composite.load_reports[0].bytes_read == stored + sum(
        reader.stored_bytes(name, "mask", "audio") for name in names
    )
