"""Registry of the commands: name → "module:function".

A command is a function whose parameters are typer options and whose docstring is its help. The
overview of `mmerge --help` shows the first paragraph of that docstring, read from the source text
without importing the module: an import would load torch or Ray for a line of help. Keeping every
command module light enough to import instead was rejected, because nothing would notice when one
became slow.

A package adds a command with an entry point in the group `mmerge.commands`:

    [project.entry-points."mmerge.commands"]
    audit = "my_package.audit:audit"

Built-in names win. Installed packages are searched only for the overview and for names that are
not built in, so that no other command pays for the search.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmerge.manifests.errors import MmergeError

ENTRY_POINT_GROUP = "mmerge.commands"
_CLI = "mmerge.pipeline.cli"
COMMANDS: dict[str, str] = {
    "inspect": f"{_CLI}.plan:inspect",
    "plan": f"{_CLI}.plan:plan",
    "run": f"{_CLI}.run:run",
    "submit": f"{_CLI}.jobs:submit",
    "jobs": f"{_CLI}.jobs:jobs",
    "status": f"{_CLI}.jobs:status",
    "show": f"{_CLI}.show:show",
    "log": f"{_CLI}.show:log",
    "diff": f"{_CLI}.show:diff",
    "verify": f"{_CLI}.store:verify",
    "sign": f"{_CLI}.signatures:sign",
    "gc": f"{_CLI}.store:gc",
    "delete": f"{_CLI}.store:delete",
    "copy": f"{_CLI}.store:copy",
    "push": f"{_CLI}.store:push",
    "place": f"{_CLI}.place:place",
    "generate": f"{_CLI}.generate:generate",
    "serve": f"{_CLI}.serve:serve",
    "export": f"{_CLI}.export:export",
    "evaluate": f"{_CLI}.evaluate:evaluate",
    "calibrate": f"{_CLI}.calibrate:calibrate",
    "methods": f"{_CLI}.methods:methods",
    "schema": f"{_CLI}.methods:schema",
    "choose-alpha": f"{_CLI}.methods:choose_alpha",
    "average-lora": f"{_CLI}.methods:average_lora",
}
"""The built-in commands, in the order of the overview."""


def list_targets() -> dict[str, str]:
    """Return "module:function" by name of every command, those of installed packages last."""
    return COMMANDS | {
        name: target for name, target in _list_entry_points().items() if name not in COMMANDS
    }


def find_target(name: str) -> str | None:
    """Return "module:function" of a command, None if there is no such command."""
    return COMMANDS.get(name) or _list_entry_points().get(name)


def _list_entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points  # 40 ms, needed for few calls

    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def load_function(name: str, target: str) -> Callable[..., Any]:
    """Import and return the function of a command.

    Raises:
        MmergeError: a package declares a command that cannot be imported.
    """
    module_name, _, attribute = target.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        if name in COMMANDS:
            raise
        raise MmergeError(
            f"command {name!r}: its entry point {target!r} cannot be loaded ({error})."
            " Update or remove the package that declares it"
        ) from error
    return function


def read_summary(target: str) -> str:
    """Return the first paragraph of a command's docstring, on one line, without importing it.

    Empty where there is no source text or no docstring: the overview works all the same.
    """
    module_name, _, attribute = target.partition(":")
    return to_summary(_read_docstrings(module_name).get(attribute))


@cache
def _read_docstrings(module_name: str) -> dict[str, str | None]:
    """Return the docstring of every function of a module, from its source text."""
    try:
        spec = find_spec(module_name)  # imports the parent packages, which are light
        get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
        source = get_source(module_name) if get_source is not None else None
        statements = ast.parse(source or "").body
    except Exception:  # noqa: BLE001 - a broken package must not take the overview away
        return {}
    return {
        node.name: ast.get_docstring(node)
        for node in statements
        if isinstance(node, ast.FunctionDef)
    }


def to_summary(docstring: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    first_paragraph = inspect.cleandoc(docstring or "").partition("\n\n")[0]
    return " ".join(first_paragraph.split())
