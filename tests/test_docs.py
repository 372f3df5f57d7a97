"""The Markdown pages: links and paths lead somewhere, lines are wrapped."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from test_layers import LAYERS

from mmerge.pipeline.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
MAX_COLUMNS = 100
FOLDERS = "pipeline|workers|manifests|tests|infra|examples|benchmarks|docs"
LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
REPOSITORY_PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w*]")
MODULE = re.compile(r"\bmmerge\.(?:pipeline|workers|manifests)(?:\.\w+)*")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:`|^    (?:\$ )?)mmerge ([a-z][a-z-]*)", re.MULTILINE)


def find_pages() -> list[Path]:
    """Return the Markdown files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(ROOT / name for name in names.split() if (ROOT / name).exists())


PAGES = find_pages()
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES]
)


def prose_lines(text: str) -> list[str]:
    """Return the lines outside fenced and indented code blocks, tables and headings."""
    lines = []
    is_code = False
    previous = ""
    for line in text.splitlines():
        is_fence = line.lstrip().startswith("```")
        starts_block = line.startswith("    ") and not previous.strip()
        if is_fence:
            is_code = not is_code
        elif not is_code and not starts_block and not line.lstrip().startswith(("|", "#")):
            lines.append(line)
        if not starts_block:
            previous = line
    return lines


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def defines(path: Path, name: str) -> bool:
    """Return whether a module binds `name` or lists it as a string (`__all__`, a lazy import)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return True
        if isinstance(node, ast.alias) and name in (node.name, node.asname):
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.Constant) and node.value == name:
            return True
    return False


def exists_as_module(dotted: str) -> bool:
    """Return whether `mmerge.x.y` is a sub-package, a module, or a name that a module binds."""
    path = ROOT.joinpath(*dotted.split(".")[1:])
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    module = module if module.is_file() else path.parent / "__init__.py"
    return module.is_file() and defines(module, path.name)


def broken_links(page: Path) -> list[str]:
    broken = []
    for _, target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        has_anchor = not anchor or path.suffix != ".md"
        if path.is_file() and not has_anchor:
            has_anchor = anchor in heading_anchors(path.read_text())
        if not path.exists() or not has_anchor:
            broken.append(target)
    return broken


def test_there_are_pages_to_check() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}


@each_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page) == []


@each_page
def test_every_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    paths = {path.rstrip(".") for path in REPOSITORY_PATH.findall(page.read_text())}
    assert not [path for path in paths if not any(ROOT.glob(path))]


@each_page
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    assert not [name for name in MODULE.findall(page.read_text()) if not exists_as_module(name)]


@each_page
def test_every_import_in_a_python_example_exists(page: Path) -> None:
    imported = set()
    for source in PYTHON_BLOCK.findall(page.read_text()):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmerge."):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not [name for name in imported if not exists_as_module(name)]


@each_page
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    assert set(COMMAND.findall(page.read_text())) <= COMMANDS.keys()


@each_page
def test_lines_of_prose_are_wrapped(page: Path) -> None:
    lines = [LINK.sub(r"\g<text>", line) for line in prose_lines(page.read_text())]
    assert not [line for line in lines if len(line) > MAX_COLUMNS and " " in line.strip()]


def test_the_architecture_page_has_the_table_of_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package, rows in LAYERS.items():
        row = "; ".join(", ".join(names) for names in rows)
        assert f"| `{package}` | {row} |" in text
        folders = [name for names in rows for name in names if (ROOT / package / name).is_dir()]
        assert not [
            name
            for name in folders
            if f"`{package}/{name}`" not in text and f"`{name}`" not in text
        ]


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[a](#a-page) [b](missing.md) [c](page.md#no-such-heading)\n")
    assert broken_links(page) == ["missing.md", "page.md#no-such-heading"]
    assert exists_as_module("mmerge.pipeline.run")
    assert exists_as_module("mmerge.pipeline.build")
    assert not exists_as_module("mmerge.pipeline.no_such_module")
    assert prose_lines("a\n```\nb\n```\n\n    c\n\n    d\n\n| e |\nf") == ["a", "", "", "", "f"]
