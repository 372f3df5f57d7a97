"""A build is never replaced: other bytes of the same build, object or table are compared with what
is stored, and refused; what is missing or damaged is repaired.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmerge.manifests.errors import BuildDiffers
from mmerge.manifests.format.entry import ShardEntry
from mmerge.manifests.format.manifest import to_manifest_bytes
from mmerge.manifests.format.publish import make_table_entry
from mmerge.manifests.format.table import make_table, read_table
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.build import commit
from mmerge.pipeline.build.run import RunReport
from mmerge.workers.tasks import merge as merge_task

Build = Callable[..., RunReport]


def make_other_table(entries: Iterable[ShardEntry]) -> bytes:
    """Return the table as another version of pyarrow might write it: equal rows, other bytes."""
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(make_table(entries))), sink, compression="snappy")
    return sink.getvalue()


def use_other_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "make_table", make_other_table)


def use_other_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let merges give other bytes under the same names, as another processor might."""
    merger = merge_task._TensorMerger
    original = merger._run_pass

    def with_other_bits(*args: Any) -> Any:
        for data in original(*args):
            changed = bytearray(data)
            changed[0] ^= 1
            yield memoryview(bytes(changed))

    monkeypatch.setattr(merger, "_run_pass", with_other_bits)


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every stored object, entry, file, table, manifest and reference."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    kept = [
        path for path in paths if path.relative_to(folder).parts[0] not in ("surveys", "claims")
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in kept
    }


@pytest.fixture
def raw(lab: Any) -> dict[str, Any]:
    return dict(lab.make_all(2))


@pytest.fixture
def build(lab: Any, raw: dict[str, Any]) -> Build:
    def build_it(*, fresh: bool = False, **changes: Any) -> RunReport:
        plan = make_plan(read_recipe(lab.write_recipe(raw | changes)))
        return run(plan, fresh=fresh)

    return build_it


@pytest.fixture
def folder(lab: Any) -> Path:
    return Path(lab.folder) / "store"


def test_the_table_lies_under_its_own_digest(build: Build, folder: Path) -> None:
    manifest = build().manifest
    assert manifest is not None
    assert manifest.table.key == f"builds/{manifest.build}/tensors.{manifest.table.digest}.parquet"
    assert len(list(folder.glob("builds/*/*"))) == 2


def test_a_fresh_run_with_another_pyarrow_leaves_manifest_and_table(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build()
    before = digests(folder)
    use_other_table(monkeypatch)
    second = build(fresh=True)
    assert second.manifest == first.manifest
    assert (second.is_new, second.is_compared, second.repaired) == (False, True, ())
    assert digests(folder) == before
    verify(str(folder)).check()


def test_builders_with_two_versions_of_pyarrow_end_with_one_build(
    lab: Any, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [make_table, make_other_table]
    monkeypatch.setattr(commit, "make_table", lambda entries: encoders.pop()(entries))
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run(plan), range(2))
    assert first.manifest == second.manifest
    store = open_store(str(lab.folder / "store"))
    assert first.manifest is not None
    assert read_table(store, first.manifest.table)
    verify(store.uri).check()


def test_a_manifest_that_appears_during_the_commit_is_used_if_it_says_the_same(
    lab: Any, build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other builder commits between the look for a manifest and its creation."""
    build()
    (manifest_path,) = folder.glob("builds/*/manifest.json")
    data = manifest_path.read_bytes()
    manifest_path.unlink()
    use_other_table(monkeypatch)
    store_class = type(open_store(str(folder)))
    put_new = store_class.put_new

    def create_after_the_other(store: Any, key: str, data_of_this: bytes) -> None:
        if key.endswith("/manifest.json"):
            manifest_path.write_bytes(data)
        put_new(store, key, data_of_this)

    monkeypatch.setattr(store_class, "put_new", create_after_the_other)
    report = build()
    assert not report.is_new
    assert manifest_path.read_bytes() == data
    verify(str(folder)).check()


def test_a_fresh_run_with_another_result_names_the_tensors_and_replaces_nothing(
    lab: Any,
    build: Build,
    folder: Path,
    raw: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., tuple[int, str]],
) -> None:
    first = build()
    before = digests(folder)
    with monkeypatch.context() as patched:
        use_other_arithmetic(patched)
        recipe = str(lab.write_recipe(raw))
        code, text = cli("run", recipe, "--executor", "serial", "--fresh")
    assert code == 1
    assert "layers.0: model.layers.0.input_layernorm.weight (delta)" in text
    assert "5 shards were computed with another result" in text
    after = digests(folder)
    assert {key: after[key] for key in before} == before
    assert not [key for key in after.keys() - before.keys() if not key.startswith("runs/")]
    verify(str(folder)).check()
    assert f"mmerge delete {folder}#{first.build[:12]} --objects --yes" in text


def test_a_second_builder_with_other_bits_does_not_overwrite_the_object_of_the_first(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry appears while the second one computes the same object."""
    build()
    before = digests(folder)
    (manifest_path,) = folder.glob("builds/*/manifest.json")
    manifest_data = manifest_path.read_bytes()
    manifest_path.unlink()
    hidden = {path: path.read_bytes() for path in folder.glob("objects/*")}
    for path in hidden:
        path.unlink()
    use_other_arithmetic(monkeypatch)
    original = merge_task._TensorMerger.write

    def write_after_the_first(*args: Any) -> Any:
        for path, data in hidden.items():
            path.write_bytes(data)
        manifest_path.write_bytes(manifest_data)
        return original(*args)

    monkeypatch.setattr(merge_task._TensorMerger, "write", write_after_the_first)
    with pytest.raises(BuildDiffers):
        build()
    after = digests(folder)
    assert {key: after[key] for key in before} == before


def damage_object(folder: Path) -> Path:
    path = sorted(folder.glob("objects/*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 0x41
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


PARTS = {
    "manifest": "builds/*/manifest.json",
    "table": "builds/*/tensors.*.parquet",
    "entry": "objects/*.json",
    "object": "objects/*.safetensors",
    "file": "files/*",
}
FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "flipped": flip,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", PARTS)
def test_a_fresh_run_repairs_whatever_is_missing_or_damaged(
    build: Build, folder: Path, part: str, fault: str
) -> None:
    build()
    before = digests(folder)
    path = sorted(folder.glob(PARTS[part]))[0]
    FAULTS[fault](path)
    report = build(fresh=True)
    assert digests(folder) == before
    assert report.reference.number == 1
    if (part, fault) != ("manifest", "missing"):
        assert str(path.relative_to(folder)) in report.repaired


@pytest.mark.parametrize("part", ["manifest", "table", "object", "file"])
@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_plain_run_repairs_what_is_missing_or_has_another_size(
    build: Build, folder: Path, part: str, fault: str
) -> None:
    build()
    before = digests(folder)
    FAULTS[fault](sorted(folder.glob(PARTS[part]))[0])
    build()
    assert digests(folder) == before


def test_a_damaged_manifest_is_repaired_with_the_table_of_the_first_builder(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    before = digests(folder)
    (manifest_path,) = folder.glob("builds/*/manifest.json")
    manifest_path.write_bytes(b"{")
    use_other_table(monkeypatch)
    build()
    assert digests(folder) == before


def test_a_manifest_edited_against_its_own_digest_is_repaired(build: Build, folder: Path) -> None:
    build()
    before = digests(folder)
    (manifest_path,) = folder.glob("builds/*/manifest.json")
    document = json.loads(manifest_path.read_bytes())
    document["method"] = "emr"
    manifest_path.write_text(json.dumps(document))
    build()
    assert digests(folder) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_of_another_pyarrow_is_repaired_with_one_of_equal_rows(
    build: Build, folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build().manifest
    assert first is not None
    (table,) = folder.glob("builds/*/*.parquet")
    rows = read_table(open_store(str(folder)), first.table)
    FAULTS[fault](table)
    use_other_table(monkeypatch)
    second = build().manifest
    assert second is not None
    assert second.table != first.table
    assert read_table(open_store(str(folder)), second.table) == rows
    verify(str(folder)).check()


@pytest.mark.parametrize("position", range(20))
def test_a_flipped_bit_anywhere_in_the_manifest_is_repaired(
    build: Build, folder: Path, position: int
) -> None:
    build()
    before = digests(folder)
    (path,) = folder.glob("builds/*/manifest.json")
    data = bytearray(path.read_bytes())
    data[position * len(data) // 20] ^= 1
    path.write_bytes(bytes(data))
    build(fresh=True)
    assert digests(folder) == before


def test_a_missing_object_is_not_filled_with_other_bytes_than_its_build_lists(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build()
    assert report.manifest is not None
    merged = next(entry for entry in report.manifest.entries if entry.role == "merge")
    (folder / merged.key).unlink()
    use_other_arithmetic(monkeypatch)
    with pytest.raises(BuildDiffers, match="computed with another result"):
        build()
    assert not (folder / merged.key).exists()


def test_an_object_without_entry_that_a_build_lists_is_not_replaced(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build()
    assert report.manifest is not None
    merged = next(entry for entry in report.manifest.entries if entry.role == "merge")
    (folder / merged.key.replace(".safetensors", ".json")).unlink()
    before = digests(folder)
    use_other_arithmetic(monkeypatch)
    with pytest.raises(BuildDiffers):
        build(mask_scale=0.75, fresh=True)
    assert digests(folder) == before


def test_what_a_killed_run_left_is_replaced_freely(build: Build, folder: Path) -> None:
    first = build()
    assert first.manifest is not None
    (manifest_path,) = folder.glob("builds/*/manifest.json")
    manifest_path.unlink()
    merged = next(entry for entry in first.manifest.entries if entry.role == "merge")
    flip(folder / merged.key)
    report = build(fresh=True)
    assert report.is_new
    assert report.manifest == first.manifest
    verify(str(folder)).check()


# copy


def test_a_copy_takes_a_build_with_another_table_as_equal(
    lab: Any, build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    target = lab.folder / "target"
    use_other_table(monkeypatch)
    build(output=str(target))
    before = digests(target)
    for everything in (False, True):
        report = copy_build(str(folder), str(target), everything=everything)
        assert (report.num_copied, report.repaired) == (0, ())
    assert digests(target) == before
    verify(str(target)).check()


@pytest.mark.parametrize("part", PARTS)
def test_a_copy_of_all_repairs_a_damaged_target(
    lab: Any, build: Build, folder: Path, part: str
) -> None:
    build()
    target = lab.folder / "target"
    copy_build(str(folder), str(target))
    before = digests(target)
    path = sorted(target.glob(PARTS[part]))[0]
    (truncate if part == "entry" else flip)(path)
    report = copy_build(str(folder), str(target), everything=True)
    assert digests(target) == before
    assert report.repaired


@pytest.mark.parametrize("everything", [False, True])
def test_a_copy_onto_the_same_build_with_other_bytes_is_refused(
    lab: Any,
    build: Build,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    everything: bool,
) -> None:
    build()
    target = lab.folder / "target"
    with monkeypatch.context() as patched:
        use_other_arithmetic(patched)
        build(output=str(target))
    before = digests(target)
    with pytest.raises(BuildDiffers, match="mmerge delete"):
        copy_build(str(folder), str(target), everything=everything)
    assert digests(target) == before
    verify(str(target)).check()


def test_a_copy_onto_objects_that_another_build_lists_with_other_bytes_is_refused(
    lab: Any, build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build is not in the target, but it shares objects with one that is."""
    build(scope="tensor")
    target = lab.folder / "target"
    with monkeypatch.context() as patched:
        use_other_arithmetic(patched)
        build(scope="tensor", output=str(target))
    (reference,) = target.glob("refs/*/*.json")
    build_digest = json.loads(reference.read_bytes())["build"]
    other = target / "builds" / ("e" * 64)
    (target / "builds" / build_digest).rename(other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace(build_digest, "e" * 64))
    before = digests(target)
    with pytest.raises(BuildDiffers, match="has other bytes there"):
        copy_build(str(folder), str(target), everything=True)
    assert digests(target) == before


# Every message about damage names a command that works.


def damage_of(part: str, folder: Path) -> None:
    """Damage one part of a build so that `verify` sees it."""
    if part == "header":
        path = sorted(folder.glob("objects/*.safetensors"))[0]
        data = bytearray(path.read_bytes())
        data[30] ^= 1
        path.write_bytes(bytes(data))
    elif part == "reference":
        (path,) = folder.glob("refs/*/*.json")
        flip(path)
    elif part == "unknown version":
        (path,) = folder.glob("builds/*/manifest.json")
        path.write_text(path.read_text().replace('"version":1}', '"version":3}'))
    else:
        flip(sorted(folder.glob(PARTS[part]))[0])


@pytest.mark.parametrize("part", [*PARTS, "header", "reference", "unknown version"])
def test_the_command_that_a_message_names_repairs_the_damage(
    lab: Any,
    build: Build,
    folder: Path,
    raw: dict[str, Any],
    part: str,
    cli: Callable[..., tuple[int, str]],
) -> None:
    build()
    recipe = str(lab.write_recipe(raw))
    damage_of(part, folder)
    code, text = cli("verify", f"{folder}#tiny")
    assert code == 1
    commands = re.findall(r"'(mmerge (?:run|delete) [^']*)'", text)
    assert commands
    for command in commands:
        arguments = command.replace("RECIPE", recipe).split()[1:]
        if arguments[0] == "run":
            arguments += ["--executor", "serial"]
        code, text = cli(*arguments)
        assert code == 0, text
    if not any(command.startswith("mmerge run") for command in commands):
        assert cli("run", recipe, "--executor", "serial")[0] == 0
    assert cli("verify", f"{folder}#tiny")[0] == 0


@pytest.mark.parametrize("part", ["header", "entry"])
def test_a_plain_run_repairs_headers_and_entries(build: Build, folder: Path, part: str) -> None:
    build()
    before = digests(folder)
    damage_of(part, folder)
    assert build().repaired
    assert digests(folder) == before


def test_a_table_whose_rows_contradict_the_objects_is_repaired(build: Build, folder: Path) -> None:
    """Its digest fits, and the manifest names it: only its sense is wrong."""
    manifest = build().manifest
    assert manifest is not None
    before = digests(folder)
    table = pq.read_table(folder / manifest.table.key)
    rows = table.to_pylist()
    rows[0]["digest"] = "0" * 64
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    entry = make_table_entry(manifest.build, sink.getvalue())
    (folder / entry.key).write_bytes(sink.getvalue())
    edited = manifest.model_copy(update={"table": entry})
    (folder / f"builds/{manifest.build}/manifest.json").write_bytes(to_manifest_bytes(edited))
    assert verify(str(folder)).damages
    build()
    (folder / entry.key).unlink()
    assert digests(folder) == before


def test_a_damaged_scan_is_scanned_again(build: Build, folder: Path) -> None:
    first = build()
    for path in folder.glob("surveys/*"):
        flip(path)
    report = build()
    assert report.build == first.build
    assert report.num_computed["scan"]
