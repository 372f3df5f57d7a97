from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.dtypes import to_tensor
from mmerge.workers.checkpoints.formed_sources import GatheredSource, RowRun
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores, TensorSource, identity_digest
from mmerge.workers.checkpoints.weight_files import read_specs

WIDTH = 5
RUNS = (
    RowRun(3, ((0, 4),)),
    RowRun(1, ()),
    RowRun(2, ((1, 0), (0, 1))),
    RowRun(1, ((1, 6),)),
)


def make_tables(folder: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> list[TensorSource]:
    tables = []
    for index, dtype in enumerate(dtypes):
        generator = torch.Generator().manual_seed(index)
        name = f"{index}.safetensors"
        save_file({"t": torch.randn(8, WIDTH, generator=generator).to(dtype)}, folder / name)
        spec = read_specs(open_readable_store(str(folder)), name, where=name)["t"]
        tables.append(TensorSource(str(folder), name, spec))
    return tables


def make_gathered(
    folder: Path, runs: tuple[RowRun, ...], dtypes: tuple[torch.dtype, torch.dtype], dtype: str
) -> tuple[GatheredSource, torch.Tensor]:
    """Return the source, and its rows by a loop."""
    tables = make_tables(folder, dtypes)
    values = [
        to_tensor(
            read_source(table, stores=OpenStores(), offset=0, num_bytes=table.spec.num_bytes),
            table.spec.dtype,
        ).reshape(8, WIDTH)
        for table in tables
    ]
    rows = []
    for run in runs:
        for step in range(run.num_rows):
            terms = [values[table][row + step].float() for table, row in run.terms]
            rows.append(sum(terms, torch.zeros(WIDTH)) / max(len(terms), 1))
    shape = (len(rows), WIDTH)
    spec = TensorSpec("t", dtype, shape, 0, len(rows) * WIDTH * DTYPE_BYTES[dtype])
    source = GatheredSource(str(folder), "0.safetensors", spec, tables=tuple(tables), runs=runs)
    return source, torch.stack(rows)


@pytest.mark.parametrize(
    ("runs", "dtypes", "dtype"),
    [
        (RUNS, (torch.float32, torch.float32), "F32"),
        (RUNS, (torch.bfloat16, torch.float16), "F32"),
        (RUNS[:2] + RUNS[3:], (torch.bfloat16, torch.bfloat16), "BF16"),
    ],
)
def test_any_entries_of_gathered_rows_are_those_of_a_loop(
    tmp_path: Path,
    runs: tuple[RowRun, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    dtype: str,
) -> None:
    source, rows = make_gathered(tmp_path, runs, dtypes, dtype)
    source = pickle.loads(pickle.dumps(source))
    expected = rows.reshape(-1)
    size = DTYPE_BYTES[dtype]
    stores = OpenStores()
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1, 3):
            data = read_source(
                source, stores=stores, offset=start * size, num_bytes=(stop - start) * size
            )
            assert to_tensor(data, dtype).float().equal(expected[start:stop])
    for start, stop in ((0, 1), (2, 5), (3, len(rows))):
        part = source.to_rows(start, stop)
        data = read_source(part, stores=stores, offset=0, num_bytes=part.spec.num_bytes)
        assert to_tensor(data, dtype).float().equal(rows[start:stop].reshape(-1))


def test_what_is_gathered_decides_the_identity(tmp_path: Path) -> None:
    source, _ = make_gathered(tmp_path, RUNS, (torch.float32, torch.float32), "F32")
    identities = {str(tmp_path): {"0.safetensors": "x", "1.safetensors": "y"}}
    shifted = (RowRun(3, ((0, 3),)), *RUNS[1:])
    other, _ = make_gathered(tmp_path, shifted, (torch.float32, torch.float32), "F32")
    assert identity_digest(identities, source) != identity_digest(identities, other)
    identities[str(tmp_path)]["1.safetensors"] = "z"
    changed = identity_digest(identities, source)
    assert changed != identity_digest(
        {str(tmp_path): {"0.safetensors": "x", "1.safetensors": "y"}}, source
    )
