"""The files of compiled kernels: what is damaged is compiled again, never loaded or executed."""

from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from mmerge.workers.kernels import kernel_cache
from mmerge.workers.kernels.kernel_cache import DIGEST_BYTES, KernelCache, store_compiled


def add_seven(number: Any) -> Any:
    return number + 7


def make_adder(addend: int) -> Callable[[int], int]:
    def add(number: int) -> int:
        return number + addend

    return add


def load(folder: Path, function: Callable[..., Any] = add_seven) -> Any:
    """Return a kernel that knows only what the folder holds, as in a new process."""
    kernel = numba.njit(nogil=True)(function)
    store_compiled(kernel, folder)
    return kernel


def num_loaded(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def find_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Name and bytes of the file of `add_seven` for integers."""
    folder = tmp_path_factory.mktemp("kernels")
    assert load(folder)(1) == 8
    path = find_file(folder)
    return path.name, path.read_bytes()


def test_a_kernel_is_loaded_by_the_next_process(stored: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / stored[0]).write_bytes(stored[1])
    kernel = load(tmp_path)
    assert kernel(1) == 8
    assert num_loaded(kernel) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: DIGEST_BYTES // 2],
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: data + b"\0",
        lambda data: b"garbage" * 1000,
    ],
)
def test_a_damaged_file_is_reported_and_written_again(
    damage: Callable[[bytes], bytes],
    stored: tuple[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, data = stored
    (tmp_path / name).write_bytes(damage(data))
    kernel = load(tmp_path)
    assert kernel(1) == 8
    assert num_loaded(kernel) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{name}: this compiled kernel is damaged" in caplog.text
    repaired = load(tmp_path)
    assert repaired(1) == 8
    assert num_loaded(repaired) == 1
    assert find_file(tmp_path).name == name


def test_no_flipped_bit_is_loaded(stored: tuple[str, bytes], tmp_path: Path) -> None:
    name, data = stored
    kernel = load(tmp_path)
    kernel_types = (numba.int64,)
    for position in range(0, len(data), 101):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (tmp_path / name).write_bytes(damaged)
        assert kernel._cache.load_overload(kernel_types, kernel.targetctx) is None
    (tmp_path / name).write_bytes(data)
    assert kernel._cache.load_overload(kernel_types, kernel.targetctx) is not None


class Trap:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded_before_its_digest_is_compared(
    stored: tuple[str, bytes], tmp_path: Path
) -> None:
    name, data = stored
    folder = tmp_path / "kernels"
    folder.mkdir()
    pickled = pickle.dumps(Trap(tmp_path / "sprung"))
    for content in (pickled, data[:DIGEST_BYTES] + pickled):
        (folder / name).write_bytes(content)
        assert load(folder)(1) == 8
    assert not (tmp_path / "sprung").exists()


def test_a_result_that_numba_cannot_rebuild_is_compiled_again(
    stored: tuple[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = load(tmp_path)
    key = kernel._cache._make_key((numba.int64,), kernel.targetctx.codegen())
    payload = pickle.dumps("of another version")
    digest = kernel_cache._make_digest(key, payload)
    (tmp_path / stored[0]).write_bytes(digest + payload)
    assert kernel(1) == 8
    assert "cannot be loaded (TypeError" in caplog.text
    assert (tmp_path / stored[0]).read_bytes()[DIGEST_BYTES:] != payload


def test_each_signature_has_its_own_file_and_no_use_for_that_of_another(tmp_path: Path) -> None:
    # Both processes look before either has stored its code.
    first, second = load(tmp_path), load(tmp_path)
    assert (first(1), second(1.5)) == (8, 8.5)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 2
    kernel = load(tmp_path)
    assert (kernel(1), kernel(1.5)) == (8, 8.5)
    assert num_loaded(kernel) == 2
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    exchanged = load(tmp_path)
    assert (exchanged(1), exchanged(1.5)) == (8, 8.5)
    assert num_loaded(exchanged) == 0


def test_values_of_an_enclosing_function_and_options_are_part_of_the_key(tmp_path: Path) -> None:
    kernels = [load(tmp_path, make_adder(addend)) for addend in (1, 2)]
    assert [kernel(1) for kernel in kernels] == [2, 3]
    assert len(list(tmp_path.iterdir())) == 2
    checked = numba.njit(boundscheck=True)(make_adder(1))
    store_compiled(checked, tmp_path)
    checked(1)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_source_is_another_kernel(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    results = []
    for number in (1, 2):
        source.write_text(f"def constant():\n    return {number}\n")
        kernel_cache._digest_file.cache_clear()
        names: dict[str, Any] = {"__name__": "source"}
        exec(compile(source.read_text(), str(source), "exec"), names)
        results.append(load(tmp_path / "kernels", names["constant"])())
    assert results == [1, 2]


def test_code_without_a_source_file_is_not_stored(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec("def constant():\n    return 1\n", names)
    assert load(tmp_path, names["constant"])() == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_reported_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(number, "no", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    assert load(tmp_path)(1) == 8
    assert load(tmp_path)(1.5) == 8.5
    assert caplog.text.count("compiled kernels cannot be stored (no)") == 1
    assert not list(tmp_path.iterdir()), "no temporary file is left"


def test_a_folder_that_is_none_is_reported_and_the_kernel_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert load(tmp_path / "file" / "kernels")(1) == 8
    assert "cannot be read (Not a directory)" in caplog.text
    assert "cannot be stored (Not a directory)" in caplog.text


def test_recompiling_deletes_the_files_of_the_kernel_alone(tmp_path: Path) -> None:
    kernel, adder = load(tmp_path), load(tmp_path, make_adder(1))
    kernel(1)
    adder(1)
    kernel._cache.flush()
    assert "make_adder" in find_file(tmp_path).name


def test_a_temporary_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid)
    folder = kernel_cache.find_cache_folder()
    assert folder is not None
    assert folder.parent.parent == tmp_path
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)
    assert kernel_cache.find_cache_folder() is None
    folder.parent.rmdir()
    folder.parent.symlink_to(tmp_path)
    assert kernel_cache.find_cache_folder() is None


def test_the_kernels_of_the_package_use_this_cache() -> None:
    from mmerge.workers.kernels.magnitudes import first_non_finite

    assert isinstance(first_non_finite._cache, KernelCache)  # type: ignore[attr-defined]
