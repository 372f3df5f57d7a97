"""Whatever is changed in a stored build is found by every command that uses it.

One build is made once, with every role of tensors, and copied for each test. A command finds a
damage when it raises; `verify` when it raises or reports. Bit flips are drawn by a seed.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Lab

from mmerge.manifests.digest import digest_bytes, digest_json
from mmerge.manifests.errors import MmergeError
from mmerge.manifests.format.identity import recompute_build_digest
from mmerge.manifests.format.manifest import Manifest, digest_manifest, read_file, read_manifest
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import SCHEMA, table_key
from mmerge.manifests.maintenance.check_build import check_build
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.maintenance.garbage_collection import collect_garbage
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.views.build_summary import read_build
from mmerge.pipeline.views.compare import compare_builds
from mmerge.workers.exports.checkpoint import export
from mmerge.workers.reconstruction.build_reader import BuildReader

FLIPS = 50
Raw = dict[str, Any]


class StoredBuild:
    """A build in a folder whose objects can be changed and restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"{folder}#tiny"
        store, self.build = open_build(self.uri)
        self.manifest = read_manifest(store, self.build)
        self.manifest_path = folder / "builds" / self.build / "manifest.json"
        self.reference_path = next(folder.glob("refs/tiny/*.json"))
        self._before: dict[Path, bytes] = {}

    def put(self, path: Path, data: bytes) -> None:
        """Replace a file until `restore`."""
        self._before.setdefault(path, path.read_bytes() if path.exists() else b"")
        path.write_bytes(data)

    def restore(self) -> None:
        for path, data in self._before.items():
            if data:
                path.write_bytes(data)
            else:
                path.unlink()
        self._before.clear()

    def flip(self, path: Path, bit: int) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        self.put(path, bytes(data))

    def put_manifest(self, raw: Raw) -> None:
        text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.put(self.manifest_path, text.encode() + b"\n")

    def put_table(self, rows: list[Raw]) -> None:
        """Put a table and everything that names it: only its content is wrong."""
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
        data = sink.getvalue()
        digest = digest_bytes(data)
        key = table_key(self.build, digest)
        self.put(self.folder / key, data)
        raw = json.loads(self.manifest_path.read_bytes())
        raw["table"] = {"key": key, "num_bytes": len(data), "digest": digest}
        self.put_manifest(raw)

    def read_rows(self) -> list[Raw]:
        rows: list[Raw] = pq.read_table(self.folder / self.manifest.table.key).to_pylist()
        return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lab = Lab(tmp_path_factory.mktemp("made"))
    lab.config["num_hidden_layers"] = 1
    # The embedding has 1,280 bytes: it is stored in two pieces, and the layer in several parts.
    run(make_plan(read_recipe(lab.write_recipe(lab.make_all(2))), max_shard_bytes=1200))
    return lab.folder / "store"


@pytest.fixture(scope="module")
def shared(made: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredBuild:
    folder = tmp_path_factory.mktemp("shared") / "store"
    shutil.copytree(made, folder)
    return StoredBuild(folder)


@pytest.fixture
def stored(shared: StoredBuild) -> Any:
    yield shared
    shared.restore()


def read_every_tensor(uri: str) -> None:
    """Read all that `load_composite` reads of a build, without making a model."""
    reader = BuildReader(uri)
    for row in list(reader.rows()):
        for _ in reader.read_blocks(row, block_bytes=1 << 20):
            pass
    for files in (
        reader.manifest.base.files,
        *(expert.files for expert in reader.manifest.experts),
    ):
        for file in files:
            read_file(reader.store, file)


COMMANDS: dict[str, Callable[[str, Path], object]] = {
    "verify": lambda uri, folder: verify(uri).check(),
    "load": lambda uri, folder: read_every_tensor(uri),
    "export": lambda uri, folder: export(uri, folder / "export"),
    "copy": lambda uri, folder: copy_build(uri, f"memory://{uuid.uuid4().hex}"),
    "diff": lambda uri, folder: compare_builds(uri, uri),
}
STRUCTURE = ("verify", "load", "export", "copy", "diff")


def check_found(stored: StoredBuild, commands: tuple[str, ...], folder: Path, what: str) -> None:
    for name in commands:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            COMMANDS[name](stored.uri, folder)
        except MmergeError:
            continue
        pytest.fail(f"{name} did not find {what}")


def test_an_unchanged_build_passes_every_command(stored: StoredBuild, tmp_path: Path) -> None:
    for name, command in COMMANDS.items():
        command(stored.uri, tmp_path / name)
    rows = stored.read_rows()
    assert {row["role"] for row in rows} == {"base", "delta", "mask", "carried", "extra_rows"}
    assert any(row["row_start"] for row in rows if row["role"] == "delta"), "in several pieces"


def objects_of(stored: StoredBuild) -> list[Path]:
    return [stored.folder / entry.key for entry in stored.manifest.entries]


@pytest.mark.parametrize(
    "kind", ["manifest", "table", "entry", "reference", "header", "data", "file"]
)
def test_each_flipped_bit_is_found(stored: StoredBuild, kind: str, tmp_path: Path) -> None:
    generator = random.Random(kind)
    paths = {
        "manifest": [stored.manifest_path],
        "table": [stored.folder / stored.manifest.table.key],
        "entry": [path.with_suffix(".json") for path in objects_of(stored)],
        "reference": [stored.reference_path],
        "header": objects_of(stored),
        "data": objects_of(stored),
        "file": [stored.folder / file.key for file in stored.manifest.unique_files()],
    }[kind]
    # An export of the text weights reads neither encoders nor the experts' files.
    commands = ("verify", "load", "copy") if kind in ("data", "file") else STRUCTURE
    for _ in range(FLIPS):
        path = generator.choice(paths)
        start, stop = 0, path.stat().st_size
        if kind in ("header", "data"):
            length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            start, stop = (0, length) if kind == "header" else (length, stop)
        bit = generator.randrange(8 * start, 8 * stop)
        stored.flip(path, bit)
        check_found(stored, commands, tmp_path / "work", f"bit {bit} of {path.name}")
        stored.restore()


def test_a_flipped_bit_of_a_tensor_that_is_exported_is_found_by_the_export(
    stored: StoredBuild, tmp_path: Path
) -> None:
    for row in stored.read_rows():
        if row["role"] in ("base", "delta", "mask") and row["row_start"] == 0:
            stored.flip(stored.folder / row["object"], 8 * row["offset"] + 3)
            check_found(stored, ("export",), tmp_path / "work", f"{row['name']} {row['role']}")
            stored.restore()


def edits_of(raw: Raw) -> dict[str, Callable[[Raw], object]]:
    """Return edits of a manifest by name: of every field, and of the order of every list."""
    digest = "0" * 64
    entry = raw["entries"]
    merged = next(i for i, item in enumerate(entry) if item["role"] == "merge")
    copied = next(i for i, item in enumerate(entry) if item["role"] == "carry")
    edits: dict[str, Callable[[Raw], object]] = {
        "kind": lambda m: m.update(kind="plain"),
        "method": lambda m: m.update(method="ties"),
        "merge": lambda m: m.update(merge="linear"),
        "dtype": lambda m: m.update(dtype="F32"),
        "template": lambda m: m.update(template="{media}{text}"),
        "parameter": lambda m: m["parameters"].update(density=0.1),
        "parameter added": lambda m: m["parameters"].update(invented=1),
        "parameter dropped": lambda m: m["parameters"].pop("density"),
        "base revision": lambda m: m["base"].update(revision=digest),
        "base source": lambda m: m["base"].update(source="hf://a/b@" + "0" * 40),
        "base files dropped": lambda m: m["base"].update(files=[]),
        "base file renamed": lambda m: m["base"]["files"][0].update(name="other.json"),
        "base file digest": lambda m: m["base"]["files"][0].update(digest=digest),
        "base file size": lambda m: m["base"]["files"][0].update(num_bytes=1),
        "build": lambda m: m.update(build=digest),
        "version": lambda m: m.update(version=2),
        "format": lambda m: m.update(format="other"),
        "unknown key": lambda m: m.update(invented=1),
        "experts reversed": lambda m: m["experts"].reverse(),
        "expert dropped": lambda m: m["experts"].pop(),
        "expert twice": lambda m: m["experts"].append(m["experts"][0]),
        "expert name": lambda m: m["experts"][0].update(name="other"),
        "expert modality": lambda m: m["experts"][0].update(modality="video"),
        "expert revision": lambda m: m["experts"][0].update(revision=digest),
        "expert source": lambda m: m["experts"][0].update(source="hf://a/b@" + "0" * 40),
        "expert parameter": lambda m: m["experts"][0]["parameters"].update(density=0.5),
        "expert renames": lambda m: m["experts"][0]["renames"].pop(),
        "expert renames swapped": lambda m: m["experts"][0]["renames"].reverse(),
        "expert placeholder": lambda m: m["experts"][0].update(placeholder="<x>"),
        "expert template": lambda m: m["experts"][0].update(template="{media}"),
        "expert rescaler": lambda m: m["experts"][0].update(rescaler=2.0),
        "expert files": lambda m: m["experts"][0].update(files=[]),
        "expert file digest": lambda m: m["experts"][0]["files"][0].update(digest=digest),
        "expert file added": lambda m: m["experts"][0]["files"].append(
            {"name": "x", "digest": digest, "num_bytes": 0}
        ),
        "expert adapters": lambda m: m["experts"][0].update(
            adapters={
                "modality_adapter": "a",
                "default_adapter": "b",
                "coefficient": 1.0,
                "scale": 1.0,
                "other_scales": {},
            }
        ),
        "entries reversed": lambda m: m["entries"].reverse(),
        "entry dropped": lambda m: m["entries"].pop(),
        "first entry dropped": lambda m: m["entries"].pop(0),
        "entry twice": lambda m: m["entries"].append(m["entries"][0]),
        "entry key": lambda m: m["entries"][0].update(key=f"objects/{digest}.safetensors"),
        "entry key of another": lambda m: m["entries"][0].update(key=m["entries"][1]["key"]),
        "table key": lambda m: m["table"].update(key="objects/x.parquet"),
        "table size": lambda m: m["table"].update(num_bytes=m["table"]["num_bytes"] + 1),
        "table digest": lambda m: m["table"].update(digest=digest),
        "inputs added": lambda m: m["entries"][copied].update(inputs={"base": digest}),
    }
    for index, title in ((merged, "merged"), (copied, "copied")):
        for field, value in (
            ("num_bytes", 8),
            ("digest", digest),
            ("role", "base"),
            ("shard", "other"),
            ("expert", "audio" if title == "merged" else "image2"),
        ):
            edits[f"{title} {field}"] = lambda m, i=index, f=field, v=value: m["entries"][i].update(
                {f: v}
            )
    for name in entry[merged]["inputs"]:
        edits[f"inputs.{name}"] = lambda m, n=name: m["entries"][merged]["inputs"].update(
            {n: "1" * 64}
        )
        edits[f"inputs without {name}"] = lambda m, n=name: m["entries"][merged]["inputs"].pop(n)
    edits["inputs dropped"] = lambda m: m["entries"][merged].pop("inputs")
    return edits


def test_each_of_more_than_fifty_edits_of_a_manifest_is_found(
    stored: StoredBuild, tmp_path: Path
) -> None:
    whole = stored.manifest_path.read_bytes()
    edits = edits_of(json.loads(whole))
    assert len(edits) >= 50
    for name, edit in edits.items():
        raw = json.loads(whole)
        edit(raw)
        assert raw != json.loads(whole), name
        stored.put_manifest(raw)
        check_found(stored, STRUCTURE, tmp_path / "work", f"edit {name!r}")
        with pytest.raises(MmergeError):
            read_build(stored.uri)
        stored.restore()


def drop_checksums(stored: StoredBuild) -> None:
    """Make a reference as version 0.1 wrote it."""
    raw = json.loads(stored.reference_path.read_bytes())
    del raw["manifest"], raw["checksum"]
    stored.put(stored.reference_path, json.dumps(raw).encode())


def test_edits_are_found_without_the_digest_in_the_reference(
    stored: StoredBuild, tmp_path: Path
) -> None:
    """Of a build that only references of version 0.1 name: all but `inputs`, which nothing else in
    the store says.
    """
    whole = stored.manifest_path.read_bytes()
    unseen = []
    drop_checksums(stored)
    for name, edit in edits_of(json.loads(whole)).items():
        raw = json.loads(whole)
        edit(raw)
        stored.put_manifest(raw)
        try:
            if not check_build(stored.uri, level="structure")[1]:
                unseen.append(name)
        except MmergeError:
            continue
    provenance = {"inputs.base", "inputs.thresholds", "inputs.expert:image", "inputs.expert:audio"}
    assert set(unseen) == provenance


def test_edits_are_found_in_a_build_that_is_opened_by_its_digest(
    stored: StoredBuild, tmp_path: Path
) -> None:
    whole = stored.manifest_path.read_bytes()
    by_digest = f"{stored.folder}#{stored.build}"
    assert check_build(by_digest, level="records")[1] == []
    for name, edit in edits_of(json.loads(whole)).items():
        raw = json.loads(whole)
        edit(raw)
        stored.put_manifest(raw)
        try:
            damages = check_build(by_digest, level="structure")[1]
        except MmergeError:
            continue
        assert damages, name
        with pytest.raises(MmergeError):
            copy_build(by_digest, str(tmp_path / "copy"))


def test_a_run_writes_an_edited_provenance_again(stored: StoredBuild, made: Path) -> None:
    """Otherwise the next reference to the build would confirm the edit."""
    recipe = made.parent / "again.yaml"
    raw_recipe = yaml.safe_load((made.parent / "recipe.yaml").read_text())
    raw_recipe["output"] = str(stored.folder)
    recipe.write_text(yaml.safe_dump(raw_recipe, sort_keys=False))
    whole = stored.manifest_path.read_bytes()
    raw = json.loads(whole)
    merged = next(entry for entry in raw["entries"] if entry["role"] == "merge")
    merged["inputs"]["thresholds"] = "1" * 64
    stored.put_manifest(raw)
    report = run(make_plan(read_recipe(recipe), max_shard_bytes=1200))
    assert stored.manifest_path.read_bytes() == whole
    assert report.repaired == (f"builds/{stored.build}/manifest.json",)
    assert verify(stored.uri).damages == []


def first(rows: list[Raw], role: str, **fields: Any) -> Raw:
    """Return the first row of a role whose tensor is a matrix."""
    return next(
        row
        for row in rows
        if row["role"] == role
        and len(row["shape"]) == 2
        and all(row[name] == value for name, value in fields.items())
    )


def add(row: Raw, field: str, amount: int) -> None:
    row[field] += amount


def swap(first_row: Raw, second_row: Raw, field: str) -> None:
    first_row[field], second_row[field] = second_row[field], first_row[field]


def swap_names(rows: list[Raw], one: str, other: str) -> None:
    """Exchange two tensors of equal shapes in all roles: the table remains consistent."""
    for row in rows:
        for before, after in ((one, other), (other, one)):
            if before in row["name"]:
                row["name"] = row["name"].replace(before, after)
                break


CONTRADICTIONS: dict[str, Callable[[list[Raw]], object]] = {
    "row dropped": lambda rows: rows.remove(first(rows, "mask")),
    "row twice": lambda rows: rows.append(dict(first(rows, "base"))),
    "expert of a mask": lambda rows: first(rows, "mask").update(expert="audio"),
    "unknown expert": lambda rows: first(rows, "mask").update(expert="nobody"),
    "role": lambda rows: first(rows, "carried").update(role="extra_rows"),
    "dtype of one width": lambda rows: first(rows, "delta").update(dtype="F16"),
    "shape turned": lambda rows: first(rows, "base")["shape"].reverse(),
    "rows moved": lambda rows: (
        add(first(rows, "delta"), "row_start", 1),
        add(first(rows, "delta"), "row_stop", 1),
    ),
    "offset": lambda rows: add(first(rows, "delta"), "offset", 8),
    "offsets swapped": lambda rows: swap(
        first(rows, "mask", expert="image"), first(rows, "mask", expert="audio"), "offset"
    ),
    "digests swapped": lambda rows: swap(
        first(rows, "mask", expert="image"), first(rows, "mask", expert="audio"), "digest"
    ),
    "digest": lambda rows: first(rows, "base").update(digest="0" * 64),
    "object of another shard": lambda rows: first(rows, "base").update(object=rows[-1]["object"]),
    "unknown object": lambda rows: first(rows, "base").update(
        object=f"objects/{'0' * 64}.safetensors"
    ),
    "shard": lambda rows: first(rows, "base").update(shard="other"),
    "layer": lambda rows: first(rows, "delta").update(layer=7),
    "name": lambda rows: first(rows, "base").update(name="model.other.weight"),
    "names swapped": lambda rows: swap_names(rows, "q_proj", "o_proj"),
    "num_entries": lambda rows: add(first(rows, "delta"), "num_entries", 1),
    "num_kept": lambda rows: add(first(rows, "mask"), "num_kept", 10**6),
    "num_agreeing": lambda rows: first(rows, "mask").update(num_agreeing=None),
    "num_masked": lambda rows: add(first(rows, "mask"), "num_masked", -1),
    "consensus": lambda rows: add(first(rows, "delta")["consensus"], 0, 1),  # type: ignore[arg-type]
    "overlaps": lambda rows: add(first(rows, "delta")["overlaps"], 0, 1),  # type: ignore[arg-type]
    "norm": lambda rows: first(rows, "mask").update(task_vector_norm=-1.0),
    "norm changed": lambda rows: first(rows, "delta").update(delta_norm=1234.5),
    "statistics dropped": lambda rows: first(rows, "delta").update(
        num_entries=None, consensus=None, overlaps=None, delta_norm=None
    ),
    "statistics of a copy": lambda rows: first(rows, "carried").update(num_entries=1),
    "statistics of a copy without entries": lambda rows: first(rows, "carried").update(num_kept=1),
    "no rows": lambda rows: rows.clear(),
}


@pytest.mark.parametrize("has_digest", [True, False], ids=["new reference", "old reference"])
def test_each_contradiction_of_a_table_is_found(
    stored: StoredBuild, has_digest: bool, tmp_path: Path
) -> None:
    """The table has the digest that the manifest says: only its rows are wrong."""
    if not has_digest:
        drop_checksums(stored)
    for name, change in CONTRADICTIONS.items():
        rows = stored.read_rows()
        change(rows)
        stored.put_table(rows)
        check_found(stored, STRUCTURE, tmp_path / "work", f"contradiction {name!r}")
    stored.restore()
    assert verify(stored.uri).damages == []


def test_a_table_with_equal_rows_in_other_bytes_is_no_damage(stored: StoredBuild) -> None:
    stored.put_table(stored.read_rows())
    assert verify(stored.uri).damages == []


@pytest.mark.parametrize("what", ["object", "entry", "file", "table", "manifest", "reference"])
@pytest.mark.parametrize("how", ["missing", "empty", "longer"])
def test_what_is_missing_empty_or_longer_is_found(
    stored: StoredBuild, what: str, how: str, tmp_path: Path
) -> None:
    path = {
        "object": objects_of(stored)[0],
        "entry": objects_of(stored)[0].with_suffix(".json"),
        "file": stored.folder / stored.manifest.base.files[0].key,
        "table": stored.folder / stored.manifest.table.key,
        "manifest": stored.manifest_path,
        "reference": stored.reference_path,
    }[what]
    stored.put(path, {"missing": b"-", "empty": b"", "longer": path.read_bytes() + b"?"}[how])
    if how == "missing":
        path.unlink()
    check_found(stored, STRUCTURE, tmp_path / "work", f"{what} {how}")


def test_a_collection_refuses_a_manifest_that_names_other_objects(stored: StoredBuild) -> None:
    raw = json.loads(stored.manifest_path.read_bytes())
    raw["entries"].pop()
    stored.put_manifest(raw)
    with pytest.raises(MmergeError, match="give build"):
        collect_garbage(open_store(str(stored.folder)))


def test_a_damage_names_the_key_what_differs_and_both_sides(stored: StoredBuild) -> None:
    raw = json.loads(stored.manifest_path.read_bytes())
    raw["entries"][0]["num_bytes"] += 1
    stored.put_manifest(raw)
    drop_checksums(stored)
    sentences = verify(stored.uri).damages
    num_bytes = stored.manifest.entries[0].num_bytes
    entry_name = objects_of(stored)[0].with_suffix(".json").name
    assert any(
        entry_name in sentence
        and f"num_bytes is {num_bytes}, the manifest says {num_bytes + 1}" in sentence
        for sentence in sentences
    )


def test_a_reference_to_a_build_of_other_fields_is_found_by_its_digest(stored: StoredBuild) -> None:
    """A whole forgery: another recipe under a name that it gives, and entries that fit."""
    raw = json.loads(stored.manifest_path.read_bytes())
    merged = next(entry for entry in raw["entries"] if entry["role"] == "merge")
    merged["inputs"]["base"] = "1" * 64
    stored.put_manifest(raw)
    manifest = Manifest.model_validate(raw)
    assert recompute_build_digest(manifest) == stored.build
    assert digest_manifest(manifest) != digest_manifest(stored.manifest)
    (sentence,) = verify(stored.uri).damages
    assert "it was changed after it was named" in sentence
    assert verify(f"{stored.folder}#{stored.build}").damages == [sentence]


def test_a_changed_reference_is_refused_though_its_json_is_valid(stored: StoredBuild) -> None:
    whole = stored.reference_path.read_bytes()
    for field, value in (("created", "2020-01-01"), ("sources", {}), ("number", 2), ("name", "x")):
        raw = json.loads(whole) | {field: value}
        stored.put(stored.reference_path, json.dumps(raw).encode())
        with pytest.raises(MmergeError, match="is damaged"):
            open_build(stored.uri)
        fields = {name: item for name, item in raw.items() if name != "checksum"}
        if field in ("number", "name"):
            raw["checksum"] = digest_json(fields)
            stored.put(stored.reference_path, json.dumps(raw).encode())
            with pytest.raises(MmergeError, match="it says that it is"):
                open_build(stored.uri)
