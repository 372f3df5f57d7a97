"""Only regular files are opened, and only within their limit."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mmerge.manifests import limits
from mmerge.manifests.errors import MmergeError, PromptError
from mmerge.manifests.limits import Limit
from mmerge.manifests.regular_file import open_regular_file, read_regular_file
from mmerge.manifests.stores.local import LocalStore

SMALL = Limit("MMERGE_MAX_TEST", 3, "bytes")


def make_special(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match=f"is a {kind}, expected a regular file"):
        open_regular_file(make_special(tmp_path, kind))


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "/" + "x" * 300])
def test_a_text_that_is_no_path_is_an_error_of_the_operating_system(path: str) -> None:
    with pytest.raises(OSError, match=r"is no path|too long"):
        open_regular_file(path)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    assert read_regular_file(tmp_path / "x", limit=SMALL) == b"123"
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(OSError, match=r"has 4 bytes, at most 3 are read\. Set MMERGE_MAX_TEST"):
        read_regular_file(tmp_path / "x", limit=SMALL)


def test_a_file_without_a_size_is_read_up_to_its_limit() -> None:
    with pytest.raises(OSError, match="at most 3 are read"):
        read_regular_file("/proc/self/status", limit=SMALL)


def test_the_environment_raises_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMERGE_MAX_TEST", "5")
    SMALL.check(5, where="x", error=PromptError)
    with pytest.raises(PromptError, match="x: has 6 bytes, at most 5 are read"):
        SMALL.check(6, where="x", error=PromptError)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e9", "٣", "9" * 30])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MMERGE_MAX_TEST", text)
    with pytest.raises(MmergeError, match="MMERGE_MAX_TEST: expected a positive whole number"):
        SMALL.check(1, where="x", error=PromptError)


def test_every_limit_has_a_variable_of_its_own_and_stands_in_the_documentation() -> None:
    table = [value for value in vars(limits).values() if isinstance(value, Limit)]
    assert len({limit.variable for limit in table}) == len(table) > 20
    page = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text()
    assert [limit.variable for limit in table if f"`{limit.variable}`" not in page] == []
    assert [limit.variable for limit in table if f"{limit.default:,}" not in page] == []


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_a_store_reads_regular_files_only(tmp_path: Path, kind: str) -> None:
    make_special(tmp_path, kind)
    store = LocalStore(tmp_path)
    with pytest.raises(MmergeError, match=r"regular file|leads out of the folder"):
        store.read(kind)
