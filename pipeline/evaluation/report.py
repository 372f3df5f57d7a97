"""Evaluations and calibrations as tables, files and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.evaluation.calibrate import Agreement, Calibration, Point
from mmerge.pipeline.evaluation.evaluate import Row, TaskScore
from mmerge.pipeline.monitoring.printable import escape


def write_report(
    folder: Path, rows: Sequence[Row], scores: Sequence[TaskScore], *, original: str | None
) -> list[Path]:
    """Write answers.parquet, scores.parquet, report.md and plots; return their paths."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, records in (("answers", rows), ("scores", scores)):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([asdict(record) for record in records]), path)
        written.append(path)
    plots = draw_scores(folder, scores, original=original) if scores else []
    text = to_markdown(rows, scores, original=original, plots=[path.name for path in plots])
    (folder / "report.md").write_text(text)
    return [*written, folder / "report.md", *plots]


def to_markdown(
    rows: Sequence[Row],
    scores: Sequence[TaskScore],
    *,
    original: str | None,
    plots: Sequence[str] = (),
) -> str:
    """Return the tables of an evaluation: scores ± standard errors, and performance retention."""
    models = list(dict.fromkeys(row.model for row in rows))
    score_of = _index_scores(scores)
    lines = [
        "# Evaluation",
        "",
        f"{len(rows)} answers of {len(models)} models. Scores in per cent ± standard error.",
        "",
        f"| task | metric | questions | {' | '.join(models)} |",
        f"|---|---|---{'|---' * len(models)}|",
    ]
    for task in dict.fromkeys(score.task for score in scores):
        first = next(score for score in scores if score.task == task)
        cells = [_to_cell(score_of.get((model, task))) for model in models]
        lines.append(f"| {task} | {first.metric} | {first.num_questions} | {' | '.join(cells)} |")
    means = [_mean([score.score for score in scores if score.model == model]) for model in models]
    lines.append(f"| **mean over tasks** | | | {' | '.join(means)} |")
    if original is not None:
        lines += ["", f"Performance retention: mean over tasks of score / score of `{original}`,"]
        lines += ["in per cent.", "", "| model | performance retention |", "|---|---|"]
        for model in models:
            ratios = [
                score.performance_retention
                for score in scores
                if score.model == model and score.performance_retention is not None
            ]
            lines.append(f"| {model} | {_mean(ratios)} |")
    lines += ["", *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines).rstrip() + "\n"


def _index_scores(scores: Sequence[TaskScore]) -> Mapping[tuple[str, str], TaskScore]:
    return {(score.model, score.task): score for score in scores}


def _to_cell(score: TaskScore | None) -> str:
    return "" if score is None else f"{100 * score.score:.1f} ± {100 * score.standard_error:.1f}"


def _mean(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def print_scores(scores: Sequence[TaskScore], console: Console) -> None:
    """Print every model's score on every task, and performance retention in parentheses."""
    models = list(dict.fromkeys(score.model for score in scores))
    table = Table("task", "metric", box=None, header_style="bold", pad_edge=False)
    for model in models:
        table.add_column(escape(model), justify="right")
    score_of = _index_scores(scores)
    for task in dict.fromkeys(score.task for score in scores):
        task_scores = [score_of.get((model, task)) for model in models]
        metric = next(score.metric for score in task_scores if score is not None)
        table.add_row(escape(task), metric, *(_to_short_cell(score) for score in task_scores))
    console.print(table)


def _to_short_cell(score: TaskScore | None) -> str:
    if score is None:
        return ""
    if score.performance_retention is None:
        return f"{score.score:.1%}"
    return f"{score.score:.1%} ({score.performance_retention:.1%})"


def print_calibration(calibration: Calibration, console: Console) -> None:
    """Print the agreement at every place of the sweep, the chosen values in green."""
    console.print(
        "agreement with the expert's own answers: probability (share of equal answers),"
        " retention | expansion"
    )
    names = list(calibration.mask_scales)
    headings = [escape(name) for name in names]
    table = Table("density", "mask scale", *headings, box=None, header_style="bold", pad_edge=False)
    points = {
        (point.density, point.mask_scale, point.expert): point for point in calibration.points
    }
    places = sorted({(point.density, point.mask_scale) for point in calibration.points})
    for density, scale in places:
        cells = []
        for name in names:
            text = _to_agreement_cell(points[(density, scale, name)])
            is_chosen = (density, scale) == (calibration.density, calibration.mask_scales[name])
            cells.append(f"[green]{text}[/]" if is_chosen else text)
        table.add_row(f"{density:g}", f"{scale:g}", *cells)
    console.print(table)
    scales = ", ".join(
        f"{escape(name)} {scale:g}" for name, scale in calibration.mask_scales.items()
    )
    reason = " (one for all agrees better than the best of each)" if calibration.is_shared else ""
    num_prompts = sum(calibration.num_prompts.values()) + calibration.num_mixed
    console.print(
        f"chosen: density {calibration.density:g}, mask scales {scales}{reason}, from {num_prompts}"
        " prompts without labels"
    )


def _to_agreement_cell(point: Point) -> str:
    def describe(agreement: Agreement) -> str:
        return f"{agreement.probability:.3f} ({agreement.same_answers:.0%})"

    return f"{describe(point.rebuilt)} | {describe(point.expanded)}"


def check_matplotlib() -> None:
    """Raise MmergeError if matplotlib is not installed: before a long run, not at its end."""
    if find_spec("matplotlib") is None:
        raise MmergeError("matplotlib is not installed. Run: pip install 'mmerge[evaluate]'")


def check_plot(path: Path) -> None:
    """Check that a plot can be written to this file.

    Raises:
        MmergeError: matplotlib or the folder is missing, or the file name has no known ending.
    """
    check_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    file_types = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in file_types:
        raise MmergeError(f"--plot: {path}: expected a name ending in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise MmergeError(f"--plot: {path}: there is no folder {path.absolute().parent}")


def open_figure(*, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure for files (no window) and its axes; width and height in inches.

    Raises:
        MmergeError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def draw_scores(folder: Path, scores: Sequence[TaskScore], *, original: str | None) -> list[Path]:
    """Draw scores.png, and with an `original` retention.png; return the files."""
    path = folder / "scores.png"
    _draw_bars(path, scores, value="score", error="standard_error", label="score")
    written = [path]
    if original is not None:
        path = folder / "retention.png"
        label = f"score / score of {original}"
        _draw_bars(path, scores, value="performance_retention", error=None, label=label)
        written.append(path)
    return written


def _draw_bars(
    path: Path, scores: Sequence[TaskScore], *, value: str, error: str | None, label: str
) -> None:
    """Draw one group of bars per task, one bar per model."""
    models = list(dict.fromkeys(score.model for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    figure, axes = open_figure(width=max(5.0, 0.25 * len(tasks) * len(models) + 2), height=3.6)
    bar_width = 0.8 / len(models)
    for position, model in enumerate(models):
        offset = (position - (len(models) - 1) / 2) * bar_width
        model_scores = {score.task: score for score in scores if score.model == model}
        places, heights, errors = [], [], []
        for index, task in enumerate(tasks):
            if task in model_scores:
                places.append(index + offset)
                heights.append(getattr(model_scores[task], value) or 0.0)
                errors.append(getattr(model_scores[task], error) if error else 0.0)
        axes.bar(places, heights, bar_width, yerr=errors if error else None, label=model)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Draw agreement over mask scale at the chosen density: retention and expansion per expert."""
    figure, axes = open_figure(width=6, height=3.6)
    for name, chosen_scale in calibration.mask_scales.items():
        points = [
            point
            for point in calibration.points
            if point.expert == name and point.density == calibration.density
        ]
        points.sort(key=lambda point: point.mask_scale)
        scales = [point.mask_scale for point in points]
        retention = [point.rebuilt.probability for point in points]
        expansion = [point.expanded.probability for point in points]
        (line,) = axes.plot(scales, retention, marker="o", label=f"{name}, retention")
        color = line.get_color()
        axes.plot(scales, expansion, "--", color=color, label=f"{name}, expansion")
        axes.axvline(chosen_scale, color=color, linewidth=0.5)
    axes.set_xlabel("mask scale λ")
    axes.set_ylabel("probability of the expert's own answers")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
