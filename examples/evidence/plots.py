"""The page's plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from evidence.calibration import Scales
from evidence.rows import Row, summarise
from evidence.tables import DENSITIES, MASK_SCALES
from mmerge.pipeline.evaluation.report import open_figure


def draw_all(folder: Path, rows: Sequence[Row], scales: Scales) -> list[str]:
    """Draw what was measured; return the names of the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, is_drawn in (
        (
            "retention",
            _bars(
                folder,
                rows,
                "retention",
                "performance_retention",
                lambda row: row.group.startswith("single/"),
                "performance retention, %",
            ),
        ),
        (
            "expansion",
            _bars(
                folder,
                rows,
                "expansion",
                "value",
                lambda row: row.group.startswith("mix/"),
                "accuracy on mixes, %",
            ),
        ),
        ("density", _density(folder, rows)),
        ("calibration", _curve(folder, scales)),
    ):
        if is_drawn:
            drawn.append(name)
    return drawn


def _bars(
    folder: Path,
    rows: Sequence[Row],
    table: str,
    value: str,
    choose: Callable[[Row], bool],
    label: str,
) -> bool:
    table_rows = [
        row
        for row in rows
        if row.table == table and choose(row) and not row.method.startswith("original")
    ]
    methods = list(dict.fromkeys(row.method for row in table_rows))
    figures = {
        m: f
        for m in methods
        if (f := summarise([row for row in table_rows if row.method == m], value=value)) is not None
    }
    if not figures:
        return False
    figure, axes = open_figure(width=7, height=0.28 * len(figures) + 1)
    names = sorted(figures, key=lambda name: figures[name].mean)
    colours = ["tab:orange" if name == "MMER" else "tab:blue" for name in names]
    axes.barh(
        names,
        [100 * figures[n].mean for n in names],
        xerr=[100 * figures[n].spread for n in names],
        color=colours,
    )
    axes.set_xlabel(label)
    figure.savefig(folder / f"{table}.png", dpi=120)
    return True


def _density(folder: Path, rows: Sequence[Row]) -> bool:
    table_rows = [
        row
        for row in rows
        if row.table == "density × mask scale" and row.group.startswith("single/")
    ]
    if not table_rows:
        return False
    figure, axes = open_figure(width=6, height=3.6)
    for density in DENSITIES:
        points = []
        for scale in MASK_SCALES:
            label = f"density {density:g}, λ {scale:g}"
            retention = summarise(
                [row for row in table_rows if row.method == label], value="performance_retention"
            )
            if retention is not None:
                points.append((scale, 100 * retention.mean))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"density {density:g}")
    axes.set_xlabel("mask scale λ")
    axes.set_ylabel("performance retention, %")
    axes.legend(fontsize=7)
    figure.savefig(folder / "density.png", dpi=120)
    return True


def _curve(folder: Path, scales: Scales) -> bool:
    calibration = scales.without_labels
    if calibration is None:
        return False
    figure, axes = open_figure(width=6, height=3.6)
    for name in calibration.mask_scales:
        curve = sorted(
            (point for point in calibration.points if point.expert == name),
            key=lambda point: point.mask_scale,
        )
        places = [point.mask_scale for point in curve]
        (line,) = axes.plot(
            places,
            [point.rebuilt.probability for point in curve],
            marker="o",
            label=f"{name}, rebuilt",
        )
        axes.plot(
            places,
            [point.expanded.probability for point in curve],
            "--",
            color=line.get_color(),
            label=f"{name}, expanded",
        )
    axes.set_xlabel("mask scale λ")
    axes.set_ylabel("probability of the expert's own answers")
    axes.legend(fontsize=7)
    figure.savefig(folder / "calibration.png", dpi=120)
    return True
