"""An evaluation as files: Parquet for questions, Markdown and plots for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.evaluation.evaluate import Row, TaskScore


def write_report(
    folder: Path, rows: Sequence[Row], scores: Sequence[TaskScore], *, original: str | None
) -> list[Path]:
    """Write answers.parquet, scores.parquet, report.md and plots into a folder; return what was
    written.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, records in (("answers", rows), ("scores", scores)):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([asdict(record) for record in records]), path)
        written.append(path)
    plots = draw_scores(folder, scores, original=original) if scores else []
    (folder / "report.md").write_text(
        to_markdown(rows, scores, original=original, plots=[path.name for path in plots])
    )
    return [*written, folder / "report.md", *plots]


def to_markdown(
    rows: Sequence[Row],
    scores: Sequence[TaskScore],
    *,
    original: str | None,
    plots: Sequence[str] = (),
) -> str:
    """Return the tables of an evaluation: score ± standard error per task and model, and
    performance retention.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    tasks = list(dict.fromkeys(score.task for score in scores))
    by = {(score.model, score.task): score for score in scores}
    lines = [
        "# Evaluation",
        "",
        f"{len(rows)} answers of {len(models)} models. Scores in per cent ± standard error.",
        "",
    ]
    lines += [
        f"| task | metric | questions | {' | '.join(models)} |",
        f"|---|---|---{'|---' * len(models)}|",
    ]
    for task in tasks:
        first = next(score for score in scores if score.task == task)
        cells = [_cell(by.get((model, task))) for model in models]
        lines.append(f"| {task} | {first.metric} | {first.num_questions} | {' | '.join(cells)} |")
    means = [
        _mean([by[(model, task)].score for task in tasks if (model, task) in by])
        for model in models
    ]
    lines += [f"| **mean over tasks** | | | {' | '.join(means)} |"]
    if original is not None:
        lines += [
            "",
            (
                f"Performance retention: mean over tasks of score / score of `{original}`, in per"
                " cent."
            ),
            "",
        ]
        lines += ["| model | performance retention |", "|---|---|"]
        for model in models:
            kept = [score.performance_retention for score in scores if score.model == model]
            lines.append(f"| {model} | {_mean([value for value in kept if value is not None])} |")
    lines += ["", *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(score: TaskScore | None) -> str:
    return "" if score is None else f"{100 * score.score:.1f} ± {100 * score.standard_error:.1f}"


def _mean(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def check_matplotlib() -> None:
    """Raise MmergeError where matplotlib is not installed: before a long run, not at its end."""
    if find_spec("matplotlib") is None:
        raise MmergeError("matplotlib is not installed: pip install 'mmerge[evaluate]'")


def check_plot(path: Path) -> None:
    """Raise MmergeError where a plot cannot be drawn to this file: no matplotlib, no such folder,
    or no such format.
    """
    check_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise MmergeError(
            f"--plot: {path}: no format of plots; expected .png, .svg or .pdf at its end"
        )
    if not path.absolute().parent.is_dir():
        raise MmergeError(f"--plot: {path}: there is no folder {path.absolute().parent}")


def open_figure(*, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, for files alone. Raises MmergeError where matplotlib is not
    installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def draw_scores(folder: Path, scores: Sequence[TaskScore], *, original: str | None) -> list[Path]:
    """Draw the scores per task and model, and with an `original` performance retention; return the
    files.
    """
    models = list(dict.fromkeys(score.model for score in scores))
    drawn: list[tuple[str, str, str, str | None]] = [
        ("scores.png", "score", "score", "standard_error")
    ]
    if original is not None:
        drawn.append(
            ("retention.png", f"score / score of {original}", "performance_retention", None)
        )
    written = []
    for file, label, value, error in drawn:
        tasks = list(dict.fromkeys(score.task for score in scores))
        figure, axes = open_figure(width=max(5.0, 0.25 * len(tasks) * len(models) + 2), height=3.6)
        width = 0.8 / len(models)
        for position, model in enumerate(models):
            by = {score.task: score for score in scores if score.model == model}
            places = [
                index + (position - (len(models) - 1) / 2) * width
                for index, task in enumerate(tasks)
                if task in by
            ]
            heights = [getattr(by[task], value) or 0.0 for task in tasks if task in by]
            spread = [getattr(by[task], error) for task in tasks if task in by] if error else None
            axes.bar(places, heights, width, yerr=spread, label=model)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_ylabel(label)
        axes.legend(fontsize=7)
        figure.savefig(folder / file, dpi=130)
        written.append(folder / file)
    return written
