"""`mmerge calibrate`: mask scales chosen without labels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.asking import (
    DeviceOption,
    MediaOption,
    PromptsOption,
    make_settings,
    opened_executor,
    read_all_questions,
)
from mmerge.pipeline.cli.options import (
    BatchOption,
    EncodersOption,
    ExecutorOption,
    JsonOption,
    RayAddressOption,
    TokensOption,
    WorkersOption,
)
from mmerge.pipeline.cli.output import err, out
from mmerge.pipeline.monitoring.printable import escape


def calibrate(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="recipe file with method mmer or tall_masks")
    ],
    prompts: PromptsOption = None,
    media: MediaOption = None,
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            metavar="0.5,0.6,…",
            help="mask scales to try [default: a grid around the published ones]",
            show_default=False,
        ),
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(
            "--densities",
            metavar="0.6,0.8,…",
            help="densities to try [default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="write the recipe with the chosen values to this file",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="plot agreement over mask scale",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: TokensOption = 64,
    batch: BatchOption = 16,
    encoders: EncodersOption = None,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "ray",
    address: RayAddressOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose mask scales (and density) from a few prompts without labels.

    The reference are the experts' own answers: the chosen values make the composite agree with them
    most.
    """
    from mmerge.pipeline.evaluation.calibrate import calibrate as sweep
    from mmerge.pipeline.evaluation.calibrated_recipe import write_recipe
    from mmerge.pipeline.evaluation.report import check_plot, draw_calibration, print_calibration
    from mmerge.pipeline.monitoring.progress import show_progress
    from mmerge.pipeline.recipes.parsing import read_recipe

    if plot is not None:
        check_plot(plot)
    questions = read_all_questions(prompts or (), media=media)
    scale_grid = _parse_numbers(scales, option="--scales")
    density_grid = _parse_numbers(densities, option="--densities")
    parsed_recipe = read_recipe(recipe)
    settings = make_settings(
        max_new_tokens=max_new_tokens, batch=batch, encoders=encoders, device=device
    )
    with (
        opened_executor(executor, address=address, workers=workers) as task_executor,
        show_progress(err) as progress,
    ):
        calibration = sweep(
            parsed_recipe,
            questions,
            scales=scale_grid,
            densities=density_grid,
            settings=settings,
            executor=task_executor,
            progress=progress,
        )
    if plot is not None:
        draw_calibration(calibration, plot)
    if to is not None:
        write_recipe(recipe, to, calibration, with_density=bool(density_grid))
    if as_json:
        print(json.dumps(asdict(calibration), indent=2))
        return
    print_calibration(calibration, out)
    if to is not None:
        out.print(f"wrote {escape(str(to))}")


def _parse_numbers(text: str | None, *, option: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(piece) for piece in text.split(",")) if text else ()
    except ValueError:
        raise RecipeError(f"{option}: expected numbers like 0.6,0.75,0.9, got {text!r}") from None
    if not all(number > 0 for number in numbers):
        raise RecipeError(f"{option}: expected numbers above 0, got {text!r}")
    return numbers
