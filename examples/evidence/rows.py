"""Counts as rows: one per table, method, task, seed and metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from evidence.measure import Counts, Job


@dataclass(frozen=True)
class Row:
    """One figure.

    `performance_retention` is value / value of the original on the same prompts; None without an
    original.
    """

    table: str
    method: str
    task: str
    seed: int
    metric: str
    value: float
    performance_retention: float | None
    group: str = ""
    """The set that the task's prompts are from, such as `single/image` or `mix/image+audio`."""


def make_rows(measured: Sequence[tuple[Job, Counts]]) -> list[Row]:
    """Return the rows of all jobs.

    Jobs with the same number of experts are averaged over the sets of experts.
    """
    originals: dict[tuple[str, str, str, str], float] = {}
    for job, counts in measured:
        if job.method in ("original", "original (LoRA twin)", "tuned on the new task", "base"):
            kind = "twin" if "twin" in job.method else "expert"
            for name, seed, task, value in _cells(counts):
                if name.startswith("new/") == job.method.startswith("tuned"):
                    originals[(kind, name, seed, task)] = value
    grouped: dict[tuple[str, str, str, str, str, bool], list[float]] = {}
    for job, counts in measured:
        is_twin = "DAMC" in job.method or "twin" in job.method
        for name, seed, task, value in _cells(counts):
            grouped.setdefault((job.table, job.method, name, seed, task, is_twin), []).append(value)
    rows = []
    for (table, method, name, seed, task, is_twin), values in grouped.items():
        reference = originals.get(("twin" if is_twin else "expert", name, seed, task))
        value = mean(values)
        rows.append(
            Row(
                table,
                method,
                task,
                int(seed),
                "accuracy",
                value,
                value / reference if reference else None,
                name,
            )
        )
    return rows


def _cells(counts: Counts) -> list[tuple[str, str, str, float]]:
    return [
        (name, seed, task, right / total)
        for name, by_seed in counts.items()
        for seed, tasks in by_seed.items()
        for task, (right, total) in tasks.items()
    ]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its standard error."""

    mean: float
    standard_error: float
    num_pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, by the normal distribution."""
        return self.mean - 1.96 * self.standard_error, self.mean + 1.96 * self.standard_error


def compare(
    rows: Sequence[Row], first: str, second: str, *, value: str = "value"
) -> Difference | None:
    """Return the paired difference of two methods; None with fewer than two pairs.

    Pairs have the same set, task and seed.
    """
    by_method: dict[str, dict[tuple[str, str, int], float]] = {first: {}, second: {}}
    for row in rows:
        figure: Any = getattr(row, value)
        if row.method in by_method and figure is not None:
            by_method[row.method][(row.group, row.task, row.seed)] = figure
    differences = [
        by_method[first][key] - by_method[second][key]
        for key in by_method[first].keys() & by_method[second].keys()
    ]
    if len(differences) < 2:
        return None
    return Difference(
        mean(differences), stdev(differences) / len(differences) ** 0.5, len(differences)
    )


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, and their standard deviation."""

    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.spread:.1f}"


def summarise(
    rows: Sequence[Row], *, choose: Callable[[Row], bool] = lambda row: True, value: str = "value"
) -> Figure | None:
    """Return the mean over tasks per seed, then over seeds; None without measurements.

    `value`: "value", or "performance_retention", which leaves tasks out that the original cannot do
    at all.
    """
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        figure: Any = getattr(row, value)
        if choose(row) and figure is not None:
            by_seed.setdefault(row.seed, []).append(figure)
    means = [mean(values) for values in by_seed.values()]
    return Figure(mean(means), stdev(means) if len(means) > 1 else 0.0) if means else None
