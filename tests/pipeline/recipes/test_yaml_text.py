"""YAML of recipes is read strictly: nothing ambiguous, nothing that expands without bound."""

from __future__ import annotations

import itertools
import time

import pytest

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.recipes.yaml_text import parse_yaml

NAMES = "abcdefghij"


def make_alias_bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise(NAMES):
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(lines)


def make_merge_bomb() -> str:
    names = [f"n{index}" for index in range(40)]
    lines = ["n0: &n0 {x: 1}"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} {{<<: [*{before}, *{before}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (make_alias_bomb(), "values with its aliases expanded, at most 100,000"),
        (make_merge_bomb(), "values with its aliases expanded, at most 100,000"),
        ("a: &a [*a]", "an alias inside the value that it stands for"),
        ("x: &x 1\ny: [" + "*x," * 101 + "]", "101 aliases, at most 100"),
        ("[" * 100_000, "51 levels of nesting, at most 50"),
        ("{a: " * 60 + "1" + "}" * 60, "51 levels of nesting"),
        ("seed: 010", "010 is an octal number in YAML 1.1"),
        ("t: 1:30", "1:30 is a number of base 60"),
        ("t: 1:30.5", "1:30.5 is a number of base 60"),
        ("name: 2024-01-01", "2024-01-01 is a date in YAML"),
        ("name: 2024-13-45", "is a date in YAML"),
        ("seed: " + "9" * 5000, "a number of 5,000 characters"),
        ('base: "\\ud800"', "half of a surrogate pair"),
        ('base: "\\0"', "a NUL character"),
        ("base: a\0b", "character 0"),
        ("1: x", "a key must be text, got 1"),
        ("yes: x", "a key must be text, got True"),
        ("? [a]\n: b", "a key must be text"),
        ("a: !!binary aGVsbG8=", "could not determine a constructor"),
        ("a: !!set {x, y}", "could not determine a constructor"),
        ("a: !!int foo", "invalid literal"),
        ("a: *b", "undefined alias"),
        ("a: 1\n---\nb: 2", "found another document"),
        ("%YAML 9.9\n--- a", "incompatible YAML document"),
    ],
)
def test_it_is_refused_with_the_reason_in_little_time(text: str, reason: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, where="r.yaml")
    assert str(caught.value).startswith("RecipeError: r.yaml")
    assert reason in str(caught.value)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: '010'\nb: \"1:30\"\nc: '2024-01-01'", {"a": "010", "b": "1:30", "c": "2024-01-01"}),
        ("x: &x {a: 1}\ny: {<<: *x, b: 2}", {"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
        ("x: &x 1\ny: *x", {"x": 1, "y": 1}),
        ("a: 0\nb: -0.5\nc: 0x10\nd: 1.0e-3", {"a": 0, "b": -0.5, "c": 16, "d": 0.001}),
        ("", None),
    ],
)
def test_other_values_are_those_of_yaml(text: str, value: object) -> None:
    assert parse_yaml(text, where="r.yaml") == value
