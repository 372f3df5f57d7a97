"""Weights formed when they are read: equal bits for any range, row slices and number of threads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.formed_sources import (
    LowRankSource,
    ReplacedRowsSource,
    make_formed_spec,
)
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import FormedSource, OpenStores, TensorSource
from mmerge.workers.checkpoints.weight_files import read_specs

ROWS, WIDTH, RANK, EXPERTS = 21, 300, 3, 4


def make_sources(folder: Path) -> dict[str, FormedSource]:
    """Write tensors, and return one source of each kind over them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "base": (ROWS, WIDTH),
        "stack": (EXPERTS, ROWS, WIDTH),
        "a": (RANK, WIDTH),
        "b": (ROWS, RANK),
        "columns a": (RANK, ROWS),
        "columns b": (WIDTH, RANK),
        "stack a": (EXPERTS * RANK, WIDTH),
        "stack b": (ROWS, RANK * EXPERTS),
        "magnitude": (ROWS,),
        "rows": (2, WIDTH),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "tensors.safetensors")
    specs = read_specs(open_readable_store(str(folder)), "tensors.safetensors", where="test")
    stored = {
        name: TensorSource(str(folder), "tensors.safetensors", spec) for name, spec in specs.items()
    }

    def low_rank(base: str, a: str, b: str, **settings: object) -> LowRankSource:
        return LowRankSource(
            str(folder),
            "tensors.safetensors",
            make_formed_spec(stored[base].spec),
            base=stored[base],
            a=stored[a],
            b=stored[b],
            scale=0.7,
            **settings,  # type: ignore[arg-type]
        )

    dora = low_rank("base", "a", "b", magnitude=stored["magnitude"])
    return {
        "LoRA": low_rank("base", "a", "b"),
        "DoRA": dora,
        "embedding": low_rank("base", "columns a", "columns b", is_transposed=True),
        "experts": low_rank("stack", "stack a", "stack b", num_matrices=EXPERTS),
        "token rows": ReplacedRowsSource(
            str(folder),
            "tensors.safetensors",
            make_formed_spec(dora.spec),
            base=dora,
            rows=stored["rows"],
            indices=(20, 3),
        ),
    }


def read_pieces(source: TensorSource, entries: int) -> bytes:
    stores, num_bytes = OpenStores(), source.spec.num_bytes
    pieces = []
    for offset in range(0, num_bytes, 4 * entries):
        size = min(4 * entries, num_bytes - offset)
        pieces.append(bytes(read_source(source, stores=stores, offset=offset, num_bytes=size)))
    return b"".join(pieces)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "embedding", "experts", "token rows"])
def test_bits_do_not_depend_on_blocks_or_slices(tmp_path: Path, kind: str) -> None:
    source = make_sources(tmp_path)[kind]
    whole = read_pieces(source, source.spec.num_entries)
    for entries in (1000, WIDTH, 137):
        assert read_pieces(source, entries) == whole, entries
    num_rows = source.spec.shape[0]
    cuts = [0, 1, num_rows - 2, num_rows]
    slices = [source.to_rows(start, stop) for start, stop in pairwise(cuts)]
    assert b"".join(read_pieces(piece, 211) for piece in slices) == whole
    inner = source.to_rows(1, num_rows).to_rows(1, num_rows - 1)
    assert read_pieces(inner, 211) == read_pieces(source.to_rows(2, num_rows), 500)


def test_a_block_that_begins_within_a_row_reads_no_input_twice(tmp_path: Path) -> None:
    source = make_sources(tmp_path)["DoRA"]
    assert isinstance(source, LowRankSource)
    ranges: list[tuple[int, int]] = []

    class Store:
        def __init__(self) -> None:
            self._store = open_readable_store(str(tmp_path))

        def read_forward(self, key: str, *, offset: int, num_bytes: int, start: int, stop: int):  # type: ignore[no-untyped-def]
            if start == source.base.spec.offset:
                ranges.append((offset, offset + num_bytes))
            return self._store.read_range(key, offset=offset, num_bytes=num_bytes)

    stores = OpenStores()
    stores[str(tmp_path)] = Store()  # type: ignore[assignment]
    for start in range(0, source.spec.num_entries, 700):
        stop = min(start + 700, source.spec.num_entries)
        read_source(source, stores=stores, offset=4 * start, num_bytes=4 * (stop - start))
    assert ranges[0][0] == source.base.spec.offset
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert ranges[-1][1] == source.base.spec.offset + source.base.spec.num_bytes
