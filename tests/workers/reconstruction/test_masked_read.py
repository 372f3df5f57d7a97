"""Weights formed while reading equal those of a loop over the stored entries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmerge.manifests.errors import DamagedObject
from mmerge.manifests.stores.open import open_store
from mmerge.workers.checkpoints.dtypes import to_bytes
from mmerge.workers.reconstruction import masked_read as formed_read
from mmerge.workers.reconstruction.bitmask import pack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_read import read_masked_weight
from mmerge.workers.reconstruction.masked_weights import BlockKernel

NAME = "model.layers.1.mlp.down_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def form_entry_by_entry(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    factors: list[float],
    *,
    divisor: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return base + (Σ factorⱼ·maskⱼ / divisor)·delta, float32, entry by entry, rounded once."""
    out = torch.empty(base.numel(), dtype=torch.float32)
    flat = [
        base.float().reshape(-1).tolist(),
        delta.float().reshape(-1).tolist(),
        *masks.reshape(len(masks), -1).tolist(),
    ]
    for entry, (value, change, *bits) in enumerate(zip(*flat, strict=True)):
        share = np.float32(0)
        for factor, bit in zip(factors, bits, strict=True):
            share = np.float32(share + np.float32(factor) * np.float32(bit))
        out[entry] = float(
            np.float32(value) + np.float32(share / np.float32(divisor)) * np.float32(change)
        )
    return out.to(dtype).reshape(base.shape)


def raw(values: torch.Tensor) -> Any:
    return np.frombuffer(to_bytes(values), np.uint8)


@pytest.mark.parametrize(
    "factors",
    [
        [1.0, 1.0, 1.0],
        [0.75, 1.5, -2.25],
        [3.0],
        [2.0, -1.0, 1.0],
        [7.0, 20.0, 90.0],
        [200.0, 100.0],
        [1.0] * 7,
        [1.0] * 10,
    ],
)
@pytest.mark.parametrize(
    ("stored", "changes", "out_dtype"),
    [(a, b, c) for a in DTYPES for b in DTYPES for c in DTYPES if a == c or b == c],
)
def test_a_block_former_equals_the_loop_over_entries(
    stored: torch.dtype, changes: torch.dtype, out_dtype: torch.dtype, factors: list[float]
) -> None:
    generator = torch.Generator().manual_seed(len(factors))
    base = torch.randn(603, generator=generator).to(stored)
    delta = torch.randn(603, generator=generator).to(changes)
    masks = torch.rand(len(factors), 603, generator=generator) < 0.4
    packed = np.stack([pack_mask(mask).numpy() for mask in masks])
    kernel = BlockKernel(
        base=stored, delta=changes, out=out_dtype, factors=factors, divisor=float(len(factors))
    )
    found = torch.full((603,), torch.nan, dtype=out_dtype)
    for start, stop in ((0, 8), (8, 400), (400, 603)):  # the last ends within a byte of bits
        bits = packed[:, start // 8 : -(-stop // 8)]
        kernel.add_block(
            raw(base[start:stop]), raw(delta[start:stop]), bits, out=raw(found[start:stop])
        )
    expected = form_entry_by_entry(
        base, delta, masks, factors, divisor=float(len(factors)), dtype=out_dtype
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if stored == out_dtype:
        values = raw(base)
        kernel.add_block(values, raw(delta), packed, out=values)
        torch.testing.assert_close(base, expected, rtol=0, atol=0)


@pytest.mark.parametrize("block_entries", [8, 1_000, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factors", [[1.0, 1.0, 1.0, 1.0], [0.5, 1.25, 2.0, 0.75]])
def test_weights_are_formed_from_what_is_stored_whatever_the_blocks(
    lab_store: str,
    monkeypatch: pytest.MonkeyPatch,
    block_entries: int,
    dtype: torch.dtype,
    factors: list[float],
) -> None:
    monkeypatch.setattr(formed_read, "BLOCK_ENTRIES", block_entries)
    reader = BuildReader(f"{lab_store}#mmer")
    base, delta = reader.read(NAME, "base"), reader.read(NAME, "delta")
    bits = [reader.read_packed_mask(NAME, expert) for expert in reader.expert_names]
    before = reader.bytes_read
    formed = read_masked_weight(
        reader, reader.masked_pieces(NAME), dtype=dtype, factors=factors, keeps_delta=True
    )
    assert formed is not None
    assert reader.bytes_read - before == base.nbytes + delta.nbytes + sum(
        each.nbytes for each in bits
    )
    assert formed.delta is not None
    assert formed.delta.equal(delta)
    assert formed.masks.equal(torch.stack(bits))
    masks = torch.from_numpy(np.unpackbits(formed.masks.numpy(), axis=1)[:, : base.numel()])
    share = sum(
        (factor * mask.to(torch.float32) for factor, mask in zip(factors, masks, strict=True)),
        torch.zeros(base.numel()),
    )
    expected = base.reshape(-1).float() + share / 4.0 * delta.reshape(-1).float()
    assert formed.values.shape == base.shape
    torch.testing.assert_close(formed.values.reshape(-1), expected.to(dtype), rtol=0, atol=0)
    alone = read_masked_weight(reader, reader.masked_pieces(NAME), dtype=dtype, factors=factors)
    assert alone is not None
    assert alone.delta is None
    assert alone.values.equal(formed.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("factors", [[1.0] * 4, [0.5, 1.25, 2.0, 0.75]])
def test_a_store_that_is_no_folder_gives_the_same_weights(
    lab_store: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factors: list[float]
) -> None:
    monkeypatch.setattr(formed_read, "BLOCK_ENTRIES", 1_000)
    local, other = (
        open_store(lab_store),
        open_store(f"memory://formed-{dtype}-{factors[0]}", create=True),
    )
    for key in local.list():
        other.put(key, bytes(local.read(key)))
    readers = [BuildReader(f"{store.uri}#mmer") for store in (local, other)]
    one, two = (
        read_masked_weight(
            reader, reader.masked_pieces(NAME), dtype=dtype, factors=factors, keeps_delta=True
        )
        for reader in readers
    )
    assert one is not None
    assert two is not None
    assert two.values.equal(one.values)
    assert two.delta is not None
    assert one.delta is not None
    assert two.delta.equal(one.delta)
    assert two.masks.equal(one.masks)


def test_what_cannot_be_formed_block_by_block_is_left_to_the_caller(lab_store: str) -> None:
    reader = BuildReader(f"{lab_store}#mmer")
    pieces = reader.masked_pieces(NAME)
    assert read_masked_weight(reader, pieces, dtype=torch.float64, factors=[1.0] * 4) is None
    assert (
        read_masked_weight(
            reader, [[*pieces[0], *pieces[0]], *pieces[1:]], dtype=torch.float32, factors=[1.0] * 4
        )
        is None
    )
    assert not reader.bytes_read


@pytest.mark.parametrize("role", ["base", "delta", "mask"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_of_any_part_is_found_behind_the_last_block(
    lab_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, where: str
) -> None:
    monkeypatch.setattr(formed_read, "BLOCK_ENTRIES", 1_000)
    shutil.copytree(lab_store, tmp_path / "store")
    reader = BuildReader(f"{tmp_path / 'store'}#mmer")
    row, *_ = next(
        rows for (kind, _, name), rows in reader._rows.items() if (kind, name) == (role, NAME)
    )
    path = tmp_path / "store" / row.object
    data = bytearray(path.read_bytes())
    data[row.offset if where == "first" else row.offset + row.num_bytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedObject, match=rf"{row.object}: {NAME} \({role}\) is damaged"):
        read_masked_weight(
            reader, reader.masked_pieces(NAME), dtype=torch.float32, factors=[1.0] * 4
        )
