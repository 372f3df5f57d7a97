from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import DamagedObject, ManifestError
from mmerge.manifests.format.manifest import read_manifest
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import StoredRow, read_table
from mmerge.manifests.maintenance.verify import verify
from mmerge.pipeline import make_plan, read_recipe, run


@pytest.fixture
def built(lab: Any) -> tuple[Path, list[StoredRow]]:
    run(make_plan(read_recipe(lab.write_recipe(lab.make_all()))))
    store, build = open_build(str(lab.folder / "store"))
    return lab.folder / "store", read_table(store, read_manifest(store, build).table)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_whole_build_verifies_and_every_byte_is_counted(
    built: tuple[Path, list[StoredRow]],
) -> None:
    seen: list[int] = []
    report = verify(str(built[0]), on_bytes=seen.append)
    report.check()
    objects = list((built[0] / "objects").glob("*.safetensors"))
    assert sum(seen) == sum(path.stat().st_size for path in objects)


@pytest.mark.parametrize("role", ["base", "delta", "mask", "carried", "extra_rows"])
def test_one_flipped_bit_is_found_and_named(built: tuple[Path, list[StoredRow]], role: str) -> None:
    folder, rows = built
    row = next(row for row in rows if row.role == role)
    flip(folder / row.object, row.offset + row.num_bytes // 2)
    report = verify(str(folder))
    assert len(report.damages) == 1
    assert row.object in report.damages[0]
    assert row.name in report.damages[0]
    with pytest.raises(DamagedObject, match=row.name):
        report.check()


def test_a_truncated_a_missing_and_a_swapped_object_are_found(
    built: tuple[Path, list[StoredRow]],
) -> None:
    folder, rows = built
    truncated, missing, swapped, swapped_in = sorted({row.object for row in rows})[:4]
    (folder / truncated).write_bytes((folder / truncated).read_bytes()[:-1])
    (folder / missing).unlink()
    data = (folder / swapped).read_bytes()
    (folder / swapped).write_bytes((folder / swapped_in).read_bytes())
    (folder / swapped_in).write_bytes(data)
    damages = "\n".join(verify(str(folder)).damages)
    assert all(key in damages for key in (truncated, missing, swapped, swapped_in))


def test_a_damaged_header_table_or_file_is_found(built: tuple[Path, list[StoredRow]]) -> None:
    folder, rows = built
    flip(folder / rows[0].object, 20)
    file = next((folder / "files").iterdir())
    flip(file, 5)
    damages = verify(str(folder)).damages
    assert any("header" in damage for damage in damages)
    assert any(file.name in damage for damage in damages)
    flip(next((folder / "builds").glob("*/tensors.*.parquet")), 50)
    with pytest.raises(ManifestError, match="damaged"):
        verify(str(folder))
