"""The matrix of families in docs/checkpoints.md says what the tests declare, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests import family_matrix
from tests.family_matrix import (
    PAGE,
    Row,
    check_declarations,
    make_rows,
    replace_table,
    to_markdown,
    write,
)
from tests.model_configs import MULTIMODAL


def test_the_page_has_the_table_that_the_tests_declare() -> None:
    page = PAGE.read_text()
    message = "write it with 'python -m tests.family_matrix'"
    assert page == replace_table(page, to_markdown(make_rows())), message


def test_every_family_has_a_row_and_a_test_of_its_composite() -> None:
    assert [row.name for row in make_rows()] == list(MULTIMODAL)
    assert check_declarations() == []


def test_a_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{family_matrix.BEGIN}\nold\n{family_matrix.END}\nbehind\n")
    write(page, lambda: [Row("Some-VL", ("llama", "yes"))])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nbehind\n")
    assert "| Some-VL | llama | yes |" in text
    assert "old" not in text
