"""The matrix of docs/checkpoints.md, from what the families' tests declare.

Every cell is a parametrised test: "yes" of one that passes, "refused" of one that checks a message.
`python -m tests.family_matrix` writes the table; a test compares it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mmerge.workers.composite.served_models import find_reason
from tests.model_configs import MULTIMODAL
from tests.pipeline.build.test_model_families import REFUSED_AS_BASE
from tests.workers.composite.test_routed_families import FIRST_CASES, NOT_ROUTED
from tests.workers.composite.test_served_logits import CASES, ONLY_OVER_PLAIN
from tests.workers.composite.test_served_models import REASONS, UNCOMPARED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md"
BEGIN = "<!-- families: begin (python -m tests.family_matrix) -->"
END = "<!-- families: end -->"
HEADER = (
    "class",
    "plain base",
    "merge and export over it",
    "over its own class",
    "composite",
    "of its own class",
    "expansion",
    "inputs compared",
)
YES, NO, NONE, UNTESTED = "yes", "refused", "-", "compared at load"


@dataclass(frozen=True)
class Row:
    """One family: for each way to use it whether a test passes, or which refusal is tested."""

    name: str
    cells: tuple[str, ...]


def make_rows() -> list[Row]:
    """Return one row per family, from the declarations of the tests."""
    return [_make_row(name) for name in MULTIMODAL]


def _make_row(name: str) -> Row:
    family = MULTIMODAL[name]
    cases = {label: case for label, case in CASES.items() if case.family == name}
    as_base = NO if name in REFUSED_AS_BASE else YES
    served = YES if cases else NO
    over_own = NO if not cases or set(cases) <= set(ONLY_OVER_PLAIN) else YES
    routed = YES if name in FIRST_CASES and name not in NOT_ROUTED else NO
    inputs = ", ".join(dict.fromkeys(case.modality for case in cases.values()))
    if name in UNCOMPARED:
        served = over_own = routed = UNTESTED
    if as_base == NO:
        over_own = NONE
    # Every family is merged over its plain language model, so that the test has no exceptions.
    cells = (family.base, YES, as_base, served, over_own, routed, inputs or NONE)
    return Row(name, cells)


def check_declarations() -> list[str]:
    """Return the families for which no test says what happens."""
    declared = {case.family for case in CASES.values()} | set(REASONS) | set(UNCOMPARED)
    return sorted(set(MULTIMODAL) - declared)


def to_markdown(rows: Iterable[Row]) -> str:
    """Return the table between its marks."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join((row.name, *row.cells))} |" for row in rows]
    return "\n".join([BEGIN, "", *lines, "", *_list_reasons(), "", END])


def _list_reasons() -> list[str]:
    """Return why families are refused, as items of a list, wrapped as prose is."""
    reasons = {name: find_reason(MULTIMODAL[name].make_config().to_dict()) for name in REASONS}
    for name in {CASES[label].family for label in ONLY_OVER_PLAIN} | set(NOT_ROUTED):
        reasons[name] = "the experts of its mixture are fused, so tokens are not routed to them"
    items = [f"- {name}: {reason}." for name, reason in sorted(reasons.items())]
    return [line for item in items for line in textwrap.wrap(item, 100, subsequent_indent="  ")]


def replace_table(text: str, table: str) -> str:
    """Return a page with the table between the marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    assert begin, f"{PAGE} has no mark {BEGIN}"
    assert end, f"{PAGE} has no mark {END}"
    return before + table + behind


def write(page: Path = PAGE, make: Callable[[], list[Row]] = make_rows) -> None:
    """Write the table to the page."""
    page.write_text(replace_table(page.read_text(), to_markdown(make())))


if __name__ == "__main__":
    write()
