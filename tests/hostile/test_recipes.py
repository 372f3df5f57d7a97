"""Hostile recipes: each is refused with one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

EXPERTS = (
    "experts:\n  image: {path: image, modality: image}\n  audio: {path: audio, modality: audio}\n"
)
PLAIN = f"name: x\nbase: base\nmethod: mmer\noutput: store\n{EXPERTS}"
LAUGHS = "\n".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def change(before: str, after: str) -> str:
    assert before in PLAIN
    return PLAIN.replace(before, after)


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "a recipe is a mapping"),
    "a list": ("[1, 2]", "a recipe is a mapping"),
    "a text": ("hello", "a recipe is a mapping"),
    "null": ("~", "a recipe is a mapping"),
    "bytes that are no UTF-8": (b"name: \xff\xfe", "is not UTF-8"),
    "a NUL": (b"name: a\0b", "character 0"),
    "UTF-16": (PLAIN.encode("utf-16"), "is not UTF-8"),
    "too many bytes": ("#" * (1 << 20) + "\n" + PLAIN, "at most 1,048,576 are read"),
    "a billion laughs": ("a: &a [x, x, x, x, x, x, x, x, x]\n" + LAUGHS, "aliases expanded"),
    "laughs in a name": (
        f"a: &a [x, x, x, x, x, x, x, x, x]\n{LAUGHS}\n" + change("name: x", "name: *i"),
        "aliases expanded",
    ),
    "an alias of itself": ("name: &n [*n]", "an alias inside the value"),
    "deep lists": ("name: " + "[" * 10_000, "levels of nesting"),
    "deep mappings": ("{a: " * 10_000, "levels of nesting"),
    "deep indentation": (
        "\n".join(" " * index + "- a:" for index in range(0, 2000, 2)),
        "levels of nesting",
    ),
    "many documents": (PLAIN + "---\n" + PLAIN, "another document"),
    "a Python object": ("name: !!python/object/apply:os.system [x]", "could not determine"),
    "a tag of its own": ("name: !evil x", "could not determine"),
    "binary": (change("name: x", "name: !!binary aGk="), "could not determine"),
    "octal": (change("name: x", "name: x\nseed: 010"), "octal"),
    "base 60": (change("name: x", "name: x\nseed: 1:30"), "base 60"),
    "a date": (change("name: x", "name: 2024-01-01"), "is a date"),
    "a boolean name": (change("name: x", "name: yes"), "YAML reads yes, no, on and off"),
    "a number as name": (change("name: x", "name: 7"), "name: "),
    "a boolean modality": (change("modality: image", "modality: on"), "YAML reads"),
    "a name that ends in a line": (change("name: x", 'name: "x\\n"'), "name: "),
    "a modality that ends in a line": (
        change("modality: image", 'modality: "image\\n"'),
        "modality",
    ),
    "an expert that ends in a line": (change("  image:", '  "image\\n":'), "no valid name"),
    "a name of dots": (change("name: x", "name: .."), "name: "),
    "a name with a slash": (change("name: x", "name: a/b"), "name: "),
    "escape codes in a key": (change("name: x", 'name: x\n"\\e[31mred": 1'), "unknown key"),
    "a direction mark in a key": (change("name: x", 'name: x\n"a\\u202eb": 1'), "unknown key"),
    "markup in a key": (change("name: x", 'name: x\n"[bold]b[/nothing]": 1'), "[bold]b[/nothing]"),
    "half a pair": (change("name: x", 'name: "\\ud800"'), "surrogate"),
    "half a pair as path": (change("path: image", 'path: "\\udcff"'), "surrogate"),
    "an integer key": (change("name: x", "name: x\n1: y"), "a key must be text"),
    "a list as key": (change("name: x", "name: x\n? [a]\n: y"), "a key must be text"),
    "a key twice": (PLAIN + "name: y\n", "is given twice"),
    "a huge number": (change("name: x", "name: x\ndensity: " + "9" * 5000), "characters"),
    "infinity": (change("name: x", "name: x\ndensity: .inf"), "density"),
    "NaN": (change("name: x", "name: x\ndensity: .nan"), "density"),
    "a negative share": (change("name: x", "name: x\ndensity: -1"), "density"),
    "a share beyond float": (change("name: x", "name: x\ndensity: 1.0e+400"), "density"),
    "NaN in a gradient": (change("name: x", "name: x\ndensity: [0.1, .nan]"), "density"),
    "infinity in a rule": (change("name: x", "name: x\ndensity: [{value: .inf}]"), "density"),
    "layers beyond 64 bits": (
        change("name: x", "name: x\ndensity: [{value: 0.5, layers: [5, -99999999999999999999]}]"),
        "density.0",
    ),
    "a list for a text": (change("base: base", "base: [base]"), "base: "),
    "a mapping for a text": (change("output: store", "output: {a: b}"), "output: "),
    "experts as a list": (change(EXPERTS, "experts: [image, audio]\n"), "experts"),
    "experts of nothing": (change(EXPERTS, "experts: {}\n"), "experts"),
    "an expert of nothing": (change("{path: image, modality: image}", "~"), "experts.image"),
    "a method that is a list": (change("method: mmer", "method: [mmer]"), "method"),
    "a method that is a path": (change("method: mmer", "method: ../../etc/passwd"), "method"),
    "a password in the output": (
        change("output: store", "output: s3://key:hunter2@bucket/x"),
        "no user name or password",
    ),
    "a signature in the base": (
        change("base: base", "base: az://container/x?sig=hunter2"),
        "holds no query",
    ),
    "a token in an expert": (
        change("path: image", "path: hf://user:hunter2@org/repo"),
        "no user name or password",
    ),
    "an unknown scheme with a password": (
        change("base: base", "base: https://user:hunter2@host/x"),
        "no user name or password",
    ),
    "a hash in the output": (change("output: store", "output: a#b"), "has a '#'"),
    "a control character in the output": (change("output: store", 'output: "a\\eb"'), "control"),
    "a path that is too long": (change("path: image", f"path: {'x' * 300}"), "File name too long"),
    "another host": (change("base: base", "base: file://host/x"), "absolute path"),
    "a user that is not there": (change("base: base", "base: ~nobody-there-x/a"), "base"),
    "an expert that is the base": (change("path: image", "path: base"), "is the base already"),
    "a template without place": (change("name: x", "name: x\ntemplate: hi"), "template"),
    "a carry of brackets": (change("name: x", "name: x\ncarry: ['[[[[[[*']"), "carry"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str, folder: Path, refuse: Any) -> None:
    text, reason = RECIPES[name]
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    err = refuse("plan", path)
    assert reason in " ".join(err.split()), err
    assert "hunter2" not in err
    assert len(err) < 5000


def make_path(folder: Path, kind: str) -> Path:
    path = folder / "r.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(folder / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "long name":
        path = folder / ("x" * 300)
    elif kind == "file as folder":
        (folder / "f").write_text("")
        path = folder / "f" / "r.yaml"
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("FIFO", "is a FIFO"),
        ("folder", "is a folder"),
        ("link to nothing", "no such recipe file"),
        ("link to itself", "symbolic links"),
        ("device", "is a device"),
        ("long name", "File name too long"),
        ("file as folder", "Not a directory"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_recipe_that_is_no_file_is_refused(
    command: str, kind: str, reason: str, folder: Path, refuse: Any
) -> None:
    assert reason in refuse(command, make_path(folder, kind))


def test_a_recipe_whose_name_is_not_utf8_is_read(folder: Path, refuse: Any) -> None:
    path = os.fsdecode(bytes(folder) + b"/\xff\x1b.yaml")
    Path(path).write_text("x: 1")
    assert "method: is missing" in refuse("plan", path)
    assert "no such recipe" in refuse("plan", path + "\udcfe")


def test_an_input_whose_path_is_not_utf8_is_refused(folder: Path, refuse: Any) -> None:
    strange = Path(os.fsdecode(bytes(folder) + b"/\xff"))
    strange.mkdir()
    (strange / "r.yaml").write_text(PLAIN.replace("path: image", "path: ../image"))
    assert "is not UTF-8, which a manifest cannot hold" in refuse("plan", strange / "r.yaml")
