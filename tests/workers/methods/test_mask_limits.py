"""Entries exactly at the limit λ/2·|τ⋆| belong to the mask, for the λ as it is written."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES
from mmerge.workers.compiled.locate_then_merge import make_mask_record
from mmerge.workers.kernels.masks import SIGNIFICANT, SIGNIFICANT_SHORT, mask_tile
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods.interface import MethodParameters, identify_parameters
from mmerge.workers.methods.mask_rules import Significant, decouple
from mmerge.workers.methods.mmer import Mmer

SCALES = ("0.6", "0.7", "0.75", "0.8", "0.9", "1.0", "0.65", "0.123", "1.1", "0.999999")


def pair_up(sizes: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.cartesian_prod(sizes, limits)
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


def run_kernel(deltas: torch.Tensor, merged: torch.Tensor, scale: str, dtype: str) -> list[bool]:
    record = make_mask_record([Significant(float(scale))], CODES[dtype])
    mask = np.zeros(len(deltas), np.uint8)
    values, stars = deltas.numpy(), merged.numpy()
    mask_tile(record.kind, values, values, stars, stars, len(mask), record.scales[0], mask)
    return [bool(bit) for bit in mask]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_mask_of_every_ratio_of_16_bits_is_that_of_exact_fractions(
    scale: str, dtype: str
) -> None:
    half = Fraction(scale) / 2
    stars = torch.arange(128, 256, dtype=torch.float32)
    # Task vectors at the limit of some τ⋆, and the float32 numbers next to it.
    near = torch.tensor([float(half * int(star)) for star in stars])
    above, below = (torch.full_like(near, value) for value in (torch.inf, 0.0))
    near = torch.cat([near, torch.nextafter(near, above), torch.nextafter(near, below)])
    deltas, merged = pair_up(near, stars)
    expected = [
        Fraction(delta) >= half * Fraction(star)
        for delta, star in zip(deltas.tolist(), merged.tolist(), strict=True)
    ]
    assert merged.to(TORCH_DTYPES[dtype]).float().equal(merged)
    assert decouple(deltas, merged, mask_scale=float(scale), dtype=dtype).tolist() == expected
    assert run_kernel(deltas, merged, scale, dtype) == expected
    negative = decouple(-deltas, -merged, mask_scale=float(scale), dtype=dtype)
    assert negative.tolist() == expected


@pytest.mark.parametrize("scale", SCALES)
def test_a_tie_with_a_rounded_float32_is_in_and_what_is_clearly_below_is_out(scale: str) -> None:
    half = Fraction(scale) / 2
    generator = torch.Generator().manual_seed(0)
    merged = torch.rand(2000, generator=generator) + 0.5
    ties = torch.tensor([float(half * Fraction(star)) for star in merged.tolist()])
    inexact = [
        Fraction(tie) < half * Fraction(star)
        for tie, star in zip(ties.tolist(), merged.tolist(), strict=True)
    ]
    for deltas, is_in in ((ties, None), (ties * (1 + 1e-6), True), (ties * (1 - 1e-6), False)):
        mask = decouple(deltas, merged, mask_scale=float(scale)).tolist()
        assert run_kernel(deltas, merged, scale, "F32") == mask
        if is_in is not None:
            assert mask == [is_in] * len(mask)
        else:
            assert all(bit or below for bit, below in zip(mask, inexact, strict=True))


def test_the_default_scale_compares_in_float32_where_that_is_exact() -> None:
    kinds = {
        (scale, dtype): make_mask_record([Significant(scale)], CODES[dtype]).kind
        for scale in (0.75, 0.6)
        for dtype in ("BF16", "F32")
    }
    assert kinds == {
        (0.75, "BF16"): SIGNIFICANT_SHORT,
        (0.75, "F32"): SIGNIFICANT,
        (0.6, "BF16"): SIGNIFICANT,
        (0.6, "F32"): SIGNIFICANT,
    }


@pytest.mark.parametrize(
    ("scale", "dtype", "is_renamed"),
    [(0.75, "BF16", False), (1.0, "F16", False), (0.6, "BF16", True), (0.75, "F32", True)],
)
def test_only_objects_whose_masks_may_have_changed_are_renamed(
    scale: float, dtype: str, is_renamed: bool
) -> None:
    raw = MethodParameters({"mask_scale": scale}, ({}, {}))
    identity = identify_parameters(Mmer(), raw, dtype=dtype)
    assert (identity != [raw.parameters, list(raw.experts)]) == is_renamed
    assert identify_parameters(Mmer(), raw) == [raw.parameters, list(raw.experts)]
