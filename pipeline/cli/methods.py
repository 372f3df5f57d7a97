"""The commands about methods: what there is, what a recipe may say, and what is computed beside a
merge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mmerge.pipeline.cli.options import JsonOption

out = Console(soft_wrap=True)


def average_lora(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="folders of LoRA adapters, of equal ranks"),
    ],
    to: Annotated[
        Path,
        typer.Option(
            "--to", metavar="DIR", help="where to write the adapter: a new or empty folder"
        ),
    ],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", help="sum, mean, ties-sum, ties-mean, ties-max, tsv, iso, wudi or wudi2"
        ),
    ] = "mean",
    density: Annotated[
        float,
        typer.Option("--density", min=0.0, max=1.0, help="share that the ties strategies keep"),
    ] = 0.2,
) -> None:
    """For comparison only: average LoRA factors A and B separately, as the official Model
    Composition code does.

    The average of the factors is not the average of the products that a model is made of. To merge
    adapters, give them as experts of a recipe.
    """
    from mmerge.workers.exports.lora_average import write_average

    written = write_average(adapters, to, strategy=strategy, density=density)
    out.print(f"wrote {written} factors to {escape(str(to))}")


def choose_alpha(
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS",
            help=(
                'JSON: {"0.0": ["answer to question 1", …], "0.1": […], …}, the same questions for'
                " each"
            ),
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Choose the coefficient of AdaMMS from a model's answers at each of a grid, without labels."""
    from mmerge.pipeline.evaluation.answers import read_answers
    from mmerge.workers.methods.adamms import choose_alpha as choose

    choice = choose(read_answers(answers))
    if as_json:
        print(
            json.dumps(
                {
                    "alphas": choice.alphas,
                    "differences": choice.differences,
                    "best": choice.best,
                    "alpha": choice.alpha,
                }
            )
        )
        return
    for below, above, count in zip(
        choice.alphas, choice.alphas[1:], choice.differences, strict=False
    ):
        out.print(f"{below:g} to {above:g}: {count} answers change")
    out.print(
        f"alpha: [bold]{choice.alpha:g}[/]"
        + (
            f" (as good: {', '.join(f'{alpha:g}' for alpha in choice.best[1:])})"
            if choice.best[1:]
            else ""
        )
    )


def methods(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the tables of docs/methods.md")
    ] = False,
) -> None:
    """List the merge methods with their parameters and sources."""
    from mmerge.pipeline.views.catalogue import methods_to_markdown, print_methods

    if as_markdown:
        print(methods_to_markdown(), end="")
    else:
        print_methods(out)


def schema() -> None:
    """Print the JSON schema of recipes, for editors and for validation elsewhere."""
    from mmerge.pipeline.recipes.recipe import make_recipe_schema

    print(json.dumps(make_recipe_schema(), indent=2))
