"""Malicious and damaged manifests and tables: refused by a clear error, and with little memory."""

from __future__ import annotations

import gc
import io
import json
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import ManifestError, StoreError
from mmerge.manifests.format.manifest import (
    Manifest,
    manifest_key,
    read_file,
    read_manifest,
    to_manifest_bytes,
)
from mmerge.manifests.format.table import SCHEMA, parse_table, read_table
from mmerge.manifests.maintenance.tensor_checks import find_piece_fault, group_pieces
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.reconstruction.build_reader import BuildReader


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def good(lab: Any) -> tuple[Store, Manifest]:
    report = run(make_plan(read_recipe(lab.write_recipe(lab.make_all(1)))))
    assert report.manifest is not None
    return open_store(str(lab.folder / "store")), report.manifest


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["entries"][0].update(key="../../../etc/passwd"),
        lambda raw: raw["entries"][0].update(key="/etc/passwd"),
        lambda raw: raw["table"].update(key="../table"),
        lambda raw: raw["base"]["files"][0].update(name="../../.bashrc"),
        lambda raw: raw["experts"][0]["files"][0].update(name="/etc/cron.d/x"),
        lambda raw: raw["base"]["files"][0].update(name=".."),
        lambda raw: raw["base"]["files"][0].update(digest="../../x"),
        lambda raw: raw.update(build="../" + "a" * 61),
        lambda raw: raw["entries"][0].update(num_bytes=-1),
        lambda raw: raw["table"].update(num_bytes=-5),
        lambda raw: raw.update(entries="x"),
        lambda raw: raw.update(invented=1),
    ],
)
def test_a_manifest_that_reaches_elsewhere_or_has_no_sense_is_refused(
    good: tuple[Store, Manifest], edit: Edit
) -> None:
    store, manifest = good
    raw = json.loads(to_manifest_bytes(manifest))
    edit(raw)
    store.put(manifest_key(manifest.build), json.dumps(raw).encode())
    with pytest.raises(ManifestError, match="damaged"):
        read_manifest(store, manifest.build)


def put_manifest(store: Store, manifest: Manifest, table: Any) -> None:
    store.put(
        manifest_key(manifest.build),
        to_manifest_bytes(manifest.model_copy(update={"table": table})),
    )


def put_table(
    store: Store, manifest: Manifest, change: dict[str, Any], *, role: str | None = None
) -> Any:
    """Put a table whose first row, or first matrix of a role, is changed, with a digest that fits:
    only its sense is wrong.
    """
    import io

    table = pq.read_table(io.BytesIO(store.read(manifest.table.key)))
    rows = table.to_pylist()
    row = next(
        row for row in rows if role is None or (row["role"] == role and len(row["shape"]) == 2)
    )
    row |= change
    if change.get("row_stop", 0) is None:
        row["row_stop"] = row["row_start"] + row["shape"][0]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    data = sink.getvalue()
    store.put(manifest.table.key, data)
    return manifest.table.model_copy(update={"digest": digest_bytes(data), "num_bytes": len(data)})


@pytest.mark.parametrize(
    "change",
    [
        {"object": "../../etc/passwd"},
        {"offset": -8},
        {"num_bytes": 1 << 60},
        {"num_bytes": -1},
        {"dtype": "X9"},
        {"role": "soup"},
        {"shape": [1 << 40]},
    ],
)
def test_a_table_whose_rows_have_no_sense_is_refused(
    good: tuple[Store, Manifest], change: dict[str, Any]
) -> None:
    store, manifest = good
    entry = put_table(store, manifest, change)
    with pytest.raises(ManifestError, match="no valid table"):
        read_table(store, entry)


def test_a_refused_table_names_the_row_and_the_column(good: tuple[Store, Manifest]) -> None:
    store, manifest = good
    entry = put_table(store, manifest, {"offset": -8})
    with pytest.raises(
        ManifestError,
        match=r"no valid table \(row 0, offset: Input should be greater than or equal to 0\)",
    ):
        read_table(store, entry)


@pytest.mark.parametrize(
    ("role", "change", "reason"),
    [
        (
            "mask",
            {"num_bytes": 8},
            r"\(mask of \w+\) of shape \(.*\) has 8 bytes of U8, packed bits of it take",
        ),
        ("mask", {"num_bytes": 0}, "has 0 bytes of U8"),
        ("mask", {"dtype": "X9"}, "has dtype X9"),
        (
            "delta",
            {"shape": [1, 1], "row_stop": 1, "num_bytes": 2},
            r"\(delta\) has shape \(1, 1\), θ₀ of that name",
        ),
        ("base", {"row_stop": 1 << 36}, "in rows 0 to 68719476736"),
        ("base", {"row_start": 1, "row_stop": None}, "begins with row 1"),
        ("base", {"shape": [-1, -1], "num_bytes": 2}, r"has shape \(-1, -1\) from row 0 on"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(
    good: tuple[Store, Manifest], role: str, change: dict[str, Any], reason: str
) -> None:
    store, manifest = good
    put_manifest(store, manifest, put_table(store, manifest, change, role=role))
    with pytest.raises(ManifestError, match=f"the table contradicts itself: .*{reason}"):
        BuildReader(store.uri)


def test_a_piece_that_is_missing_in_the_middle_is_seen(good: tuple[Store, Manifest]) -> None:
    store, manifest = good
    pieces = group_pieces(read_table(store, manifest.table))
    assert all(len(rows) == 1 for rows in pieces.values())
    (row,) = next(rows for rows in pieces.values() if len(rows[0].shape) == 2)
    first = row.model_copy(update={"shape": (1, row.shape[1]), "row_stop": 1})
    last = row.model_copy(update={"shape": (row.shape[0] - 2, row.shape[1]), "row_start": 2})
    assert find_piece_fault([first, last]) == (
        "has a piece that ends at row 1 and one that begins at row 2"
    )


def test_a_table_with_any_byte_changed_is_read_or_refused(good: tuple[Store, Manifest]) -> None:
    store, manifest = good
    whole = bytes(store.read(manifest.table.key))
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 0x41
        store.put(manifest.table.key, bytes(data))
        entry = manifest.table.model_copy(
            update={"digest": digest_bytes(bytes(data)), "num_bytes": len(data)}
        )
        with suppress(ManifestError):
            read_table(store, entry)


def make_repetitive_table(num_rows: int) -> bytes:
    """Return a small file of many rows, all equal."""
    columns = [
        pa.nulls(num_rows, field.type)
        if pa.types.is_list(field.type)
        else pa.repeat(pa.scalar("w" if field.type == pa.string() else 0, field.type), num_rows)
        for field in SCHEMA
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def test_a_small_table_of_millions_of_rows_takes_no_memory() -> None:
    data = make_repetitive_table(3_500_000)
    assert len(data) < 1 << 20
    before = peak_bytes()
    with pytest.raises(ValueError, match="MMERGE_MAX_TABLE_ROWS"):
        parse_table(data)
    assert peak_bytes() - before < 1 << 28


def make_bloated_table(num_rows: int, **values: Any) -> bytes:
    """Return a small file of equal rows with these values in some columns."""
    columns = [
        pa.nulls(num_rows, field.type)
        if field.name not in values
        else pa.repeat(pa.scalar(values[field.name], field.type), num_rows)
        for field in SCHEMA
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("num_rows", "values", "message"),
    [
        (2, {"shard": "x" * (1 << 20)}, "shard: has a text of 1,048,576 bytes, at most 65,536"),
        (9000, {"name": "x" * 60_000}, "has 540,000,000 bytes once decompressed, at most"),
        (2, {"shape": [1] * 2_000_000}, "MMERGE_MAX_TABLE_BYTES"),
    ],
    ids=["one long text", "a text in many rows", "a long list"],
)
def test_a_small_table_of_large_values_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("MMERGE_MAX_TABLE_BYTES", str(1 << 24))
    data = make_bloated_table(num_rows, **values)
    assert len(data) < 1 << 20
    gc.collect()
    before = peak_bytes()
    with pytest.raises(ValueError, match=message):
        parse_table(data)
    assert peak_bytes() - before < 1 << 26


def test_bytes_that_are_no_parquet_are_refused(good: tuple[Store, Manifest]) -> None:
    store, manifest = good
    store.put(manifest.table.key, b"PAR1 no table")
    entry = manifest.table.model_copy(
        update={"digest": digest_bytes(b"PAR1 no table"), "num_bytes": 13}
    )
    with pytest.raises(ManifestError, match="no valid table"):
        read_table(store, entry)


@pytest.mark.parametrize("kind", ["memory", "local", "moto"])
def test_a_range_of_2_to_the_60_bytes_takes_no_memory(places: Any, kind: str) -> None:
    store = open_store(places.make(kind), create=True)
    store.put("a", b"123")
    before = peak_bytes()
    with pytest.raises(StoreError, match="a"):
        store.read_range("a", offset=0, num_bytes=1 << 60)
    assert peak_bytes() - before < 100 << 20


def test_a_file_larger_than_its_manifest_says_is_not_read(good: tuple[Store, Manifest]) -> None:
    store, manifest = good
    file = manifest.base.files[0]
    with (Path(store.uri) / file.key).open("ab") as handle:
        handle.truncate(1 << 31)
    before = peak_bytes()
    with pytest.raises(ManifestError, match=file.name):
        read_file(store, file)
    assert verify(store.uri).damages
    assert peak_bytes() - before < 100 << 20


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=20), at=st.integers(0, 5000), cut=st.booleans())
def test_any_damage_of_a_manifest_raises_only_our_errors(
    good: tuple[Store, Manifest], noise: bytes, at: int, cut: bool
) -> None:
    store, manifest = open_store("memory://fuzz"), good[1]
    data = to_manifest_bytes(manifest)
    at %= len(data)
    store.put(
        manifest_key(manifest.build), data[:at] + noise + (b"" if cut else data[at + len(noise) :])
    )
    try:
        damaged = read_manifest(store, manifest.build)
    except ManifestError:
        return
    assert damaged.build == manifest.build


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), value=json_values)
def test_any_value_in_any_place_of_a_manifest_raises_only_our_errors(
    good: tuple[Store, Manifest], data: Any, value: Any
) -> None:
    store, manifest = open_store("memory://fuzz"), good[1]
    raw: Any = json.loads(to_manifest_bytes(manifest))
    place = raw
    while True:
        key: Any = data.draw(
            st.sampled_from(sorted(place))
            if isinstance(place, dict)
            else st.integers(0, len(place) - 1)
        )
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    store.put(manifest_key(manifest.build), json.dumps(raw).encode())
    try:
        damaged = read_manifest(store, manifest.build)
    except ManifestError:
        return
    assert all(
        ".." not in entry.key.split("/") and not entry.key.startswith("/")
        for entry in damaged.entries
    )
