"""The code of third-party methods: results of other code must be other objects.

Built-in methods have versions instead: `ARITHMETIC_VERSION`, and `revision` of the method.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmerge.manifests.digest import digest_bytes, digest_json
from mmerge.manifests.errors import RecipeError

CODE_SUFFIXES = (".py", ".so", ".pyd", ".dylib")


@cache
def digest_source(method_class: type[Any]) -> str | None:
    """Return the digest of the code of a third-party method, None for a built-in one.

    Covered are the code files of the top-level packages (or of the single modules) that define the
    class, its base classes and its compiled pass. Libraries that these import are not.

    Raises:
        RecipeError: the class has no source that can be read.
    """
    names = {base.__module__ for base in method_class.__mro__ if _is_third_party(base)}
    if method_class.compiled_pass:
        names.add(method_class.compiled_pass.partition(":")[0])
    names = {name for name in names if not name.startswith("mmerge.")}
    if not names:
        return None
    parts: list[list[str]] = []
    for name in sorted(names):
        files = _list_code_files(name)
        parts += [[name, title, digest_bytes(path.read_bytes())] for title, path in files]
        if not files:
            parts.append([name, "", digest_bytes(_read_class_source(method_class).encode())])
    return digest_json(parts)


def _is_third_party(base: type) -> bool:
    return not base.__module__.startswith("mmerge.") and base not in (object, ABC)


def _list_code_files(name: str) -> list[tuple[str, Path]]:
    """Return the code files that belong to a module, each with its path in the package."""
    package = _find_package(name)
    if package is not None and package.__file__ is not None:
        folder = Path(package.__file__).parent
        paths = sorted(path for path in folder.rglob("*") if path.name.endswith(CODE_SUFFIXES))
        return [(path.relative_to(folder).as_posix(), path) for path in paths]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not Path(file).is_file():
        return []
    return [("", Path(file))]


def _find_package(name: str) -> ModuleType | None:
    """Return the outermost ordinary package of a module; a namespace package is none."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:length]))
        if getattr(module, "__path__", None) and getattr(module, "__file__", None):
            return module
    return None


def _read_class_source(method_class: type) -> str:
    """Return the source of a class that was defined in a notebook or at a prompt."""
    try:
        return inspect.getsource(method_class)
    except (OSError, TypeError) as error:
        raise RecipeError(
            f"method: the source of {method_class.__name__} cannot be read ({error}), so nothing"
            " would tell its results from those of another version. Define it in a file"
        ) from error
