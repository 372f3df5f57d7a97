"""YAML of recipes: no repeated keys, no values whose type differs between versions of YAML.

PyYAML follows YAML 1.1, in which 010 is eight, 1:30 is ninety and 2024-01-01 is a date. Such
values are refused, so that nothing is merged with a number that nobody wrote.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmerge.manifests import limits
from mmerge.manifests.errors import RecipeError, first_line

_AMBIGUOUS = {
    "tag:yaml.org,2002:int": (
        (re.compile(r"[-+]?0[0-7_]+"), "is an octal number in YAML 1.1"),
        (re.compile(r"[-+]?[0-9_]+(:[0-9_]+)+"), "is a number of base 60 in YAML 1.1"),
    ),
    "tag:yaml.org,2002:float": (
        (re.compile(r"[-+]?[0-9_]+(:[0-9_.]+)+"), "is a number of base 60 in YAML 1.1"),
    ),
    "tag:yaml.org,2002:timestamp": ((re.compile(r".*", re.DOTALL), "is a date in YAML"),),
}
_MAX_DIGITS = 400
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")
)
"""Types of a recipe's values; `timestamp` is refused with a reason of its own."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, ambiguous scalars, and documents that expand without bound."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_aliases = 0
        self._sizes: dict[int, int] = {}
        """Values below each composed node, by its identity, with aliases expanded."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self._num_aliases += 1
            _refuse_excess(limits.RECIPE_ALIASES, self._num_aliases, event.start_mark)
        self._depth += 1
        _refuse_excess(limits.RECIPE_DEPTH, self._depth, event.start_mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[id(node)] = self._measure(node)
            _refuse_excess(limits.RECIPE_VALUES, self._sizes[id(node)], event.start_mark)
        elif id(node) not in self._sizes:
            _refuse("an alias inside the value that it stands for", event.start_mark)
        return node

    def _measure(self, node: Any) -> int:
        """Return the number of values below a node with aliases expanded; check the node itself."""
        if node.tag not in _TAGS and node.tag != "!":
            _refuse(
                f"could not determine a constructor for the tag {node.tag!r}: a recipe has text,"
                " numbers, true, false, null, lists and mappings",
                node.start_mark,
            )
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
            return 1
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        return 1 + sum(self._sizes[id(part)] for part in parts)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"a key must be text, got {key!r}. Put it into quotes", key_node.start_mark)
            if key in seen:
                _refuse(f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Raise for a scalar that is ambiguous, too long a number, or no Unicode text."""
    value = node.value
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        _refuse("text with half of a surrogate pair, which is no character", node.start_mark)
    if "\0" in value:
        _refuse("text with a NUL character", node.start_mark)
    if node.style is not None:
        return  # in quotes
    for pattern, meaning in _AMBIGUOUS.get(node.tag, ()):
        if pattern.fullmatch(value):
            _refuse(
                f"{value} {meaning}. Write a decimal number, or put it into quotes",
                node.start_mark,
            )
    if node.tag.endswith((":int", ":float")) and len(value) > _MAX_DIGITS:
        _refuse(f"a number of {len(value):,} characters", node.start_mark)


def _refuse_excess(limit: limits.Limit, amount: int, mark: Any) -> None:
    if amount > limit.value:
        _refuse(f"the document {limit.describe_excess(amount)}", mark)


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def parse_yaml(text: str, *, where: str) -> object:
    """Return what a YAML text describes: mappings with keys of text, lists and scalars.

    Raises:
        RecipeError: it is malformed, ambiguous, too deep or too large, or has a key twice; names
            the line and column.
    """
    loader = None
    try:
        loader = _StrictLoader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if error.context == "expected a single document in the stream":
            raise RecipeError(
                f"{where}: holds several YAML documents (found another document in line"
                f" {mark.line + 1 if mark else 0}). A recipe is one. Write each to a file of its"
                " own, run them in turn, and 'mmerge export' those that later ones read (a file of"
                " mergekit-multi names them)"
            ) from None
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{where}, line {number}: has the character {error.character!r}, which YAML does not"
            " allow"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = first_line(error)
        raise RecipeError(f"{where}: is not valid YAML ({reason})") from None
    finally:
        if loader is not None:
            loader.dispose()
