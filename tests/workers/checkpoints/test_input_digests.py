"""Hashes of input bytes: one changed bit anywhere is noticed, by checksum as by BLAKE3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.block_reader import InputReader
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.input_digests import (
    SEED_DIGITS,
    BlockDigests,
    InputChanged,
    PieceDigests,
    ScanDigests,
    make_seed,
)
from mmerge.workers.checkpoints.sources import TensorSource

BLOCK = 1 << 12
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [1, 7, 120, 121, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]
"""Entries of a tensor: shorter than any stripe of the hashes, whole blocks, and with a tail."""


def write_tensor(folder: Path, values: torch.Tensor) -> TensorSource:
    folder.mkdir(exist_ok=True)
    save_file({"weight": values}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return Checkpoint(str(folder), owner="base").tensors["weight"]


def read_all(sources: list[TensorSource], digests: BlockDigests) -> None:
    with InputReader() as reader:
        for _ in reader.blocks(sources, block_entries=BLOCK, digests=digests):
            pass


def scan(sources: list[TensorSource], seed: int | None = None) -> ScanDigests:
    digests = ScanDigests(len(sources), seed=make_seed() if seed is None else seed)
    read_all(sources, digests)
    return digests


def flip(source: TensorSource, bit: int) -> None:
    path = Path(source.uri) / source.file
    data = bytearray(path.read_bytes())
    data[source.spec.offset + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_one_flipped_bit_anywhere_is_noticed_by_checksum_and_by_digest(
    tmp_path: Path, dtype: torch.dtype, length: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    sources = [
        write_tensor(tmp_path / name, torch.randn(length, generator=generator).to(dtype))
        for name in ("base", "expert")
    ]
    scanned = scan(sources)
    checksums = scanned.checksums()
    read_all(sources, PieceDigests(sources, scanned.hexdigests(), checksums=checksums))
    num_bits = 8 * sources[1].spec.num_bytes
    block_bits = 8 * BLOCK * dtype.itemsize
    bits = {0, 1, num_bits // 2, num_bits - 1, block_bits - 1, block_bits, block_bits + 9}
    for bit in sorted(bit for bit in bits if bit < num_bits):
        flip(sources[1], bit)
        for expected in (checksums, []):
            digests = PieceDigests(sources, scanned.hexdigests(), checksums=expected)
            with pytest.raises(InputChanged, match=r"expert/model\.safetensors"):
                read_all(sources, digests)
        flip(sources[1], bit)


def test_every_single_bit_of_short_and_long_inputs_changes_the_checksum() -> None:
    generator = np.random.default_rng(0)
    for length in (1, 16, 17, 128, 129, 240, 241, 1024, 1025):
        data = bytearray(generator.bytes(length))
        checksums = set()
        for bit in [None, *range(8 * length)]:
            changed = bytearray(data)
            if bit is not None:
                changed[bit // 8] ^= 1 << bit % 8
            digests = ScanDigests(1, seed=7)
            digests.update([memoryview(changed)])
            checksums.add(digests.checksums()[0])
        assert len(checksums) == 8 * length + 1, length


def test_digest_and_checksum_do_not_depend_on_the_blocks() -> None:
    data = np.random.default_rng(1).bytes(100_003)
    results = set()
    for step in (1_000, 4_096, 65_536, 200_000):
        digests = ScanDigests(1, seed=3)
        for start in range(0, len(data), step):
            digests.update([memoryview(data)[start : start + step]])
        results.add((digests.hexdigests()[0], digests.checksums()[0]))
    assert {digest for digest, _ in results} == {blake3(data).hexdigest()}
    assert len(results) == 1


def test_two_scans_of_equal_bytes_have_one_digest_and_two_checksums(tmp_path: Path) -> None:
    source = write_tensor(tmp_path / "base", torch.zeros(BLOCK))
    first, second = scan([source]), scan([source])
    assert first.hexdigests() == second.hexdigests()
    assert first.checksums() != second.checksums()
    checksum = second.checksums()[0]
    assert checksum != first.checksums()[0]
    seed = int(checksum[:SEED_DIGITS], 16)
    assert scan([source], seed=seed).checksums() == [checksum]


@pytest.mark.parametrize("name", ["XXH3", "BLAKE3"])
def test_the_error_names_tensor_file_function_and_both_hashes(tmp_path: Path, name: str) -> None:
    source = write_tensor(tmp_path / "base", torch.ones(5))
    scanned = scan([source])
    flip(source, 3)
    checksums = scanned.checksums() if name == "XXH3" else []
    with pytest.raises(CheckpointError) as caught:
        read_all([source], PieceDigests([source], scanned.hexdigests(), checksums=checksums))
    message = str(caught.value)
    expected = (checksums or scanned.hexdigests())[0]
    assert f"weight: {tmp_path}/base/model.safetensors: " in message
    assert f"the scan read bytes of {name} {expected}, a later pass bytes of {name} " in message
    actual = message.rpartition(" ")[2]
    assert len(actual) == len(expected)
    assert actual != expected


def test_a_piece_is_compared_with_its_own_rows(tmp_path: Path) -> None:
    source = write_tensor(tmp_path / "base", torch.arange(64.0).reshape(8, 8))
    pieces = [source.to_rows(0, 3), source.to_rows(3, 8)]
    scanned = [scan([piece], seed=1).checksums() for piece in pieces]
    for piece, checksums in zip(pieces, scanned, strict=True):
        read_all([piece], PieceDigests([piece], ["unused"], checksums=checksums))
    moved = replace(pieces[0], spec=replace(pieces[0].spec, offset=pieces[0].spec.offset + 32))
    with pytest.raises(InputChanged):
        read_all([moved], PieceDigests([moved], ["unused"], checksums=scanned[0]))
