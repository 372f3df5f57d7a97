"""Compiled kernels on disk: a file per kernel, signature and processor, with a digest in front.

Numba's own cache is not used. It unpickles whatever its files hold: a truncated one ends the
process, and a flipped bit of machine code is executed. It also numbers the files of a function, so
that two processes that compile it for different signatures at once may write the same file, and one
signature gets the code of the other.
"""

from __future__ import annotations

import logging
import os
import pickle
import stat
import sys
import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import numba
from blake3 import blake3
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from mmerge.manifests.regular_file import describe_os_error, open_regular_file

DIGEST_BYTES = 32
"""Length of the digest in front of each file."""

log = logging.getLogger("mmerge.kernels")


def find_cache_folder() -> Path | None:
    """Return the folder of compiled kernels: one of the user, or a temporary one where there is
    none (containers); None where the temporary one belongs to another user.

    Its name is the digest of the kernels' sources: the code of a kernel contains that of kernels in
    other files.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    name = f"kernels-{blake3(sources).hexdigest(8)}"
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if folder:
        return Path(folder) / name
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(home) / ".cache") / "mmerge"
    parents = (user_cache, *user_cache.parents)
    nearest = next((parent for parent in parents if parent.exists()), user_cache)
    if os.access(nearest, os.W_OK):
        return user_cache / name
    temporary = Path(tempfile.gettempdir()) / f"mmerge-{os.getuid()}"
    return temporary / name if _is_private(temporary) else None


def _is_private(folder: Path) -> bool:
    """Return whether only this user can write to the folder, which is created if it is missing.

    Anyone may create a folder of this name among temporary files, with code of their own in it.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    is_writable_by_others = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    is_folder = stat.S_ISDIR(status.st_mode)
    return is_folder and status.st_uid == os.getuid() and not is_writable_by_others


def store_compiled(dispatcher: Any, folder: Path | None) -> None:
    """Let a numba dispatcher keep its compiled code in a folder, as `cache=True` does in numba's.

    Code of a function without a source file is not kept: nothing tells its versions apart.
    """
    if folder is not None and Path(dispatcher.py_func.__code__.co_filename).is_file():
        dispatcher._cache = KernelCache(dispatcher, folder)


class KernelCache:
    """The files of one kernel, for numba's `Dispatcher`.

    Numba calls, under its lock, `load_overload` before it compiles a signature, and `save_overload`
    afterwards. Neither raises: a file that is missing, damaged or unreadable means that the kernel
    is compiled again, and one that cannot be written is reported once per process.
    """

    def __init__(self, dispatcher: Any, folder: Path) -> None:
        function = dispatcher.py_func
        code = function.__code__
        # Values that the function takes from an enclosing one, such as numbers, decide its code.
        closure = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._folder = folder
        self._name = f"{Path(code.co_filename).stem}.{function.__qualname__}".replace("<", "")
        self._name = self._name.replace(">", "")
        self._source = (
            numba.__version__,
            sys.implementation.cache_tag,
            function.__module__,
            function.__qualname__,
            code.co_firstlineno,
            _digest_file(code.co_filename),
            blake3(code.co_code).hexdigest(),
            blake3(dumps(closure)).hexdigest() if closure else "",
            sorted(dispatcher.targetoptions.items()),
        )

    @property
    def cache_path(self) -> str:
        """The folder of the files, which numba shows in its statistics."""
        return str(self._folder)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compile result stored for a signature, None where it has to be compiled."""
        target_context.refresh()
        key = self._make_key(signature, target_context.codegen())
        path = self._find_path(key)
        try:
            with open_regular_file(path) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _report_unreadable(str(self._folder), describe_os_error(error))
            return None
        digest, payload = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        # Pickles and machine code do what their bytes say: nothing is read before this comparison.
        if digest != _make_digest(key, payload):
            log.warning("%s: this compiled kernel is damaged and is compiled again", path)
            return None
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception as error:  # noqa: BLE001 - whatever the reason, compiling is the remedy
            reason = f"{type(error).__name__}: {error}"
            log.warning(
                "%s: this compiled kernel cannot be loaded (%s) and is compiled again", path, reason
            )
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Store the compile result of a signature in place of what its file held."""
        fields = result._asdict()
        if fields["lifted"] or fields["library"].has_dynamic_globals:
            return  # code with addresses of this process
        key = self._make_key(signature, result.codegen)
        payload = dumps(result._reduce())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_file(self._find_path(key), _make_digest(key, payload) + payload)
        except OSError as error:
            _report_unwritable(str(self._folder), describe_os_error(error))

    def flush(self) -> None:
        """Delete the files of this kernel, which numba asks for in `Dispatcher.recompile`."""
        for path in self._folder.glob(f"{self._name}-*"):
            path.unlink(missing_ok=True)

    def _make_key(self, signature: Any, codegen: Any) -> bytes:
        """Return everything that decides the code, as bytes."""
        return repr((self._source, str(signature), codegen.magic_tuple())).encode()

    def _find_path(self, key: bytes) -> Path:
        return self._folder / f"{self._name}-{blake3(key).hexdigest(16)}.kernel"


def _make_digest(key: bytes, payload: bytes) -> bytes:
    """Return the digest of a file's payload and key: a file under another's name is damaged too."""
    return blake3(blake3(key).digest() + payload).digest(DIGEST_BYTES)


@cache
def _digest_file(name: str) -> str:
    return blake3(Path(name).read_bytes()).hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: another process sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@cache
def _report_unreadable(folder: str, reason: str) -> None:
    log.warning("%s: compiled kernels cannot be read (%s); they are compiled again", folder, reason)


@cache
def _report_unwritable(folder: str, reason: str) -> None:
    log.warning(
        "%s: compiled kernels cannot be stored (%s); every process compiles them again. Set"
        " NUMBA_CACHE_DIR to a folder that can be written",
        folder,
        reason,
    )
