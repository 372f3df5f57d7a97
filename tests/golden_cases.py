"""Golden cases: results of official implementations, stored in `tests/golden`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.pipeline.build.run import RunReport
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader

GOLDEN = Path(__file__).resolve().parent / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
NAMES = [(item["name"], tuple(item["shape"])) for item in MANIFEST["flat_order"]]
Case = dict[str, Any]
_numbers = itertools.count()


def cases(*methods: str) -> Any:
    """Return the decorator that runs a test once per case; informational cases are left out."""
    selected = [
        case
        for case in MANIFEST["cases"]
        if case["method"] in methods and case["tolerance"]["kind"] != "informational"
    ]
    return pytest.mark.parametrize("case", selected, ids=[case["id"] for case in selected])


@cache
def read_file(path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of the golden folder."""
    return load_file(GOLDEN / path)


def expected(case: Case, name: str) -> torch.Tensor | None:
    """Return one expected tensor of a case, None where the case has none of that name."""
    return read_file(case["output"]).get(f"{case['id'].split('/', 1)[1]}/{name}")


def expected_bits(case: Case, name: str) -> NDArray[np.bool_] | None:
    """Return one expected mask, boolean [P] or [experts, P]."""
    packed = expected(case, name)
    return (
        None
        if packed is None
        else np.unpackbits(packed.numpy(), axis=-1)[..., : MANIFEST["n_parameters"]].astype(bool)
    )


def to_flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all tensors as one float32 vector in the golden order."""
    return torch.cat([named[name].reshape(-1).to(torch.float32) for name, _ in NAMES])


def from_flat(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that a flat vector holds."""
    sizes = [int(np.prod(shape)) for _, shape in NAMES]
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(NAMES, flat.split(sizes), strict=True)
    }


def input_folders(case: Case) -> list[Path]:
    """Return the checkpoints that a case was made from: base first, then the experts."""
    return [GOLDEN / Path(name).parent for name in case["inputs"]]


@cache
def read_inputs(*folders: Path) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of checkpoints, widened to float32."""
    return [
        {
            name: value.to(torch.float32)
            for name, value in load_file(folder / "model.safetensors").items()
        }
        for folder in folders
    ]


def base_of(case: Case) -> torch.Tensor:
    """Return θ₀ of a case, flat."""
    return to_flat(read_inputs(*input_folders(case))[0])


def build(
    case: Case, method: str, *, experts: Sequence[dict[str, Any]] | None = None, **keys: Any
) -> tuple[BuildReader, RunReport]:
    """Run the whole pipeline on the inputs of a case, in memory, and open the build.

    `keys` are keys of the recipe, `experts` those of each expert.
    """
    base, *folders = input_folders(case)
    numbers = experts or [{} for _ in folders]
    listed = {
        f"expert{i}": {"path": str(path), "modality": f"m{i}"} | numbers[i]
        for i, path in enumerate(folders)
    }
    output = f"memory://golden-{next(_numbers)}"
    raw = {
        "method": method,
        "base": str(base),
        "experts": listed,
        "output": output,
        "dtype": "float32",
    } | keys
    store = open_store(output, create=True)  # a memory store lives while it is referenced
    report = run(make_plan(parse_recipe(raw, folder=GOLDEN)))
    reader = BuildReader(output)
    assert reader.store.uri == store.uri
    return reader, report


def merged_of(reader: BuildReader) -> torch.Tensor:
    """Return the merged checkpoint of a plain build, flat."""
    return to_flat({name: reader.read(name, "merged") for name, _ in NAMES})


def delta_of(reader: BuildReader) -> torch.Tensor:
    """Return τ⋆ of a build with masks, flat."""
    return to_flat({name: reader.read(name, "delta") for name, _ in NAMES})


def masks_of(reader: BuildReader) -> NDArray[np.bool_]:
    """Return the masks of a build, boolean [experts, P]."""
    rows = [
        to_flat(
            {
                name: unpack_mask(reader.read_packed_mask(name, expert), shape)
                for name, shape in NAMES
            }
        )
        for expert in reader.expert_names
    ]
    return torch.stack(rows).numpy().astype(bool)


def check_close(case: Case, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert |x − y| ≤ atol + rtol·|y| outside the positions that the case marks as ambiguous."""
    ambiguous = expected_bits(case, "ambiguous")
    keep = (
        torch.ones(actual.numel(), dtype=torch.bool)
        if ambiguous is None
        else torch.from_numpy(~ambiguous)
    )
    tolerance = case["tolerance"]
    torch.testing.assert_close(
        actual.reshape(-1)[keep],
        expected.reshape(-1).to(torch.float32)[keep],
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


def check_masks(case: Case, actual: NDArray[np.bool_], name: str) -> None:
    """Assert that masks are equal, outside the positions that the case marks as fragile."""
    expected = expected_bits(case, name)
    assert expected is not None
    fragile = expected_bits(case, name.replace("mask", "fragile", 1))
    differing = (actual != expected) & ~(np.zeros_like(expected) if fragile is None else fragile)
    assert not differing.any(), f"{differing.sum()} bits of {name} differ"
