"""Local files are read block by block, however little the system returns per call."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.stores.local_file import LocalFile, read_blocks_of

DATA = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(DATA.tobytes())
    return tmp_path / "file"


def read_blocks(
    path: Path,
    *,
    offset: int,
    num_bytes: int,
    block_bytes: int,
    into: NDArray[np.uint8] | None = None,
) -> Generator[NDArray[np.uint8]]:
    with LocalFile(path, name="here: file") as file:
        yield from read_blocks_of(
            file, offset=offset, num_bytes=num_bytes, block_bytes=block_bytes, into=into
        )


def open_files(path: Path) -> int:
    """How often this process has the file open."""
    held = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            held += entry.readlink() == path
        except FileNotFoundError:  # that of the listing itself
            continue
    return held


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(0, 10_000), (1, 9_999), (4_095, 1_500), (9_999, 1), (300, 0)]
)
@pytest.mark.parametrize("block_bytes", [7, 1_000, 1 << 20])
def test_a_range_is_read_in_blocks_to_where_the_caller_wants_it(
    path: Path, offset: int, num_bytes: int, block_bytes: int
) -> None:
    into = np.full(num_bytes, 255, np.uint8)
    start = 0
    for block in read_blocks(
        path, offset=offset, num_bytes=num_bytes, block_bytes=block_bytes, into=into
    ):
        assert len(block) == min(block_bytes, num_bytes - start)
        assert np.shares_memory(block, into)
        assert np.array_equal(block, DATA[offset + start : offset + start + len(block)])
        start += len(block)
    assert start == num_bytes
    assert np.array_equal(into, DATA[offset : offset + num_bytes])
    assert not open_files(path)


def test_readers_in_step_have_memory_of_their_own_and_later_ones_use_it_again(path: Path) -> None:
    def read(offset: int) -> list[NDArray[np.uint8]]:
        return list(read_blocks(path, offset=offset, num_bytes=3_000, block_bytes=900))

    first = read_blocks(path, offset=0, num_bytes=3_000, block_bytes=900)
    second = read_blocks(path, offset=5_000, num_bytes=3_000, block_bytes=900)
    places = set()
    for index, (block, other_block) in enumerate(zip(first, second, strict=True)):
        start = 900 * index
        assert np.array_equal(block, DATA[start : start + len(block)])
        assert np.array_equal(other_block, DATA[5_000 + start : 5_000 + start + len(other_block)])
        places |= {block.ctypes.data, other_block.ctypes.data}
    assert len(places) == 2
    assert {block.ctypes.data for block in read(0)} <= places


@pytest.mark.parametrize("most", [1, 13])
def test_a_system_that_gives_less_than_was_asked_is_asked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, views, offset: preadv(file, [views[0][:most]], offset)
    )
    copies = [
        block.copy() for block in read_blocks(path, offset=5, num_bytes=2_000, block_bytes=600)
    ]
    assert [len(block) for block in copies] == [600, 600, 600, 200]
    assert np.array_equal(np.concatenate(copies), DATA[5:2_005])


def test_a_system_without_preadv_reads_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    copies = [
        block.copy() for block in read_blocks(path, offset=5, num_bytes=2_000, block_bytes=600)
    ]
    assert np.array_equal(np.concatenate(copies), DATA[5:2_005])


def test_a_file_that_is_too_short_is_not_begun(path: Path) -> None:
    into = np.zeros(9_001, np.uint8)
    with pytest.raises(StoreError, match=r"here: file: bytes 1000 to 10001 .*it ends at 10000"):
        list(read_blocks(path, offset=1_000, num_bytes=9_001, block_bytes=500, into=into))
    assert not into.any()
    assert not open_files(path)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_wait(path: Path) -> None:
    blocks = read_blocks(path, offset=0, num_bytes=10_000, block_bytes=1_000)
    next(blocks)
    os.truncate(path, 1_500)
    with pytest.raises(StoreError, match=r"here: file: bytes 1000 to 2000 .*it ends at 1500"):
        list(blocks)
    assert not open_files(path)


def test_a_reader_that_is_left_closes_its_file(path: Path) -> None:
    blocks = read_blocks(path, offset=0, num_bytes=10_000, block_bytes=1_000)
    next(blocks)
    assert open_files(path) == 1
    blocks.close()
    assert not open_files(path)


def test_a_missing_file_and_a_folder_are_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(NotFound, match="here: x: not found"):
            LocalFile(path, name="here: x")
    assert not open_files(tmp_path)
