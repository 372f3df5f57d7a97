"""The command that chooses mask scales."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli import questions as asking

if TYPE_CHECKING:
    from mmerge.pipeline.evaluation.calibrate import Calibration

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def calibrate(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="a recipe of 'mmer' or 'tall_masks'")
    ],
    prompts: asking.PromptsOption = None,
    media: asking.MediaOption = None,
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales", metavar="0.5,0.6,…", help="mask scales to try", show_default=False
        ),
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(
            "--densities",
            metavar="0.6,0.8,…",
            help="densities to try; the recipe's if absent",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="write the recipe with the chosen numbers",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="draw the curve", show_default=False),
    ] = None,
    max_new_tokens: asking.TokensOption = 64,
    batch: asking.BatchOption = 16,
    encoders: asking.EncodersOption = None,
    device: asking.DeviceOption = "cpu",
    executor: asking.ExecutorOption = "ray",
    address: asking.AddressOption = None,
    workers: asking.WorkersOption = None,
    as_json: asking.JsonOption = False,
) -> None:
    """Choose mask scales (and density) from a few prompts without labels: by agreement with the
    experts' own answers.
    """
    from mmerge.pipeline.evaluation.calibrate import calibrate as sweep
    from mmerge.pipeline.evaluation.calibrate import write_recipe
    from mmerge.pipeline.evaluation.report import check_plot
    from mmerge.pipeline.monitoring.progress import show_progress
    from mmerge.pipeline.recipes.recipe import read_recipe

    if plot is not None:
        check_plot(plot)
    questions = asking.read_all(prompts, media=media)
    grid = _numbers(scales, "--scales")
    wanted = _numbers(densities, "--densities")
    made = read_recipe(recipe)
    settings = asking.make_settings(
        max_new_tokens=max_new_tokens, batch=batch, encoders=encoders, device=device
    )
    with (
        asking.open_executor(executor, address=address, workers=workers) as where,
        show_progress(err) as progress,
    ):
        found = sweep(
            made,
            questions,
            scales=grid,
            densities=wanted,
            settings=settings,
            executor=where,
            progress=progress,
        )
    if plot is not None:
        _draw_curve(found, plot)
    if to is not None:
        write_recipe(recipe, to, found, with_density=bool(wanted))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_calibration(found)
        if to is not None:
            out.print(f"wrote {escape(str(to))}")


def _numbers(text: str | None, option: str) -> tuple[float, ...]:
    try:
        found = tuple(float(piece) for piece in text.split(",")) if text else ()
    except ValueError:
        raise RecipeError(f"{option}: expected numbers like 0.6,0.75,0.9, got {text!r}") from None
    if not all(number > 0 for number in found):
        raise RecipeError(f"{option}: expected numbers above 0, got {text!r}")
    return found


def _print_calibration(found: Calibration) -> None:
    out.print(
        "agreement with the expert's own answers: probability (share of same answers), rebuilt |"
        " expanded"
    )
    names = list(found.mask_scales)
    table = Table("density", "mask scale", *names, box=None, header_style="bold", pad_edge=False)
    by = {(point.density, point.mask_scale, point.expert): point for point in found.points}
    for density, scale in sorted({(point.density, point.mask_scale) for point in found.points}):
        cells = []
        for name in names:
            point = by[(density, scale, name)]
            text = (
                f"{point.rebuilt.probability:.3f} ({point.rebuilt.same_answers:.0%}) |"
                f" {point.expanded.probability:.3f} ({point.expanded.same_answers:.0%})"
            )
            is_chosen = density == found.density and scale == found.mask_scales[name]
            cells.append(f"[green]{text}[/]" if is_chosen else text)
        table.add_row(f"{density:g}", f"{scale:g}", *cells)
    out.print(table)
    chosen = ", ".join(f"{name} {scale:g}" for name, scale in found.mask_scales.items())
    how = " (one for all agrees better than the best of each)" if found.is_shared else ""
    out.print(
        f"chosen: density {found.density:g}, mask scales {chosen}{how}, from"
        f" {sum(found.num_prompts.values()) + found.num_mixed} prompts without labels"
    )


def _draw_curve(found: Calibration, path: Path) -> None:
    from mmerge.pipeline.evaluation.report import open_figure

    figure, axes = open_figure(width=6, height=3.6)
    for name in found.mask_scales:
        own = sorted(
            (p for p in found.points if p.expert == name and p.density == found.density),
            key=lambda p: p.mask_scale,
        )
        xs = [point.mask_scale for point in own]
        (line,) = axes.plot(
            xs, [point.rebuilt.probability for point in own], marker="o", label=f"{name}, rebuilt"
        )
        axes.plot(
            xs,
            [point.expanded.probability for point in own],
            "--",
            color=line.get_color(),
            label=f"{name}, expanded",
        )
        axes.axvline(found.mask_scales[name], color=line.get_color(), linewidth=0.5)
    axes.set_xlabel("mask scale λ")
    axes.set_ylabel("probability of the expert's own answers")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
