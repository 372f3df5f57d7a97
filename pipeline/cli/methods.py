"""Commands about methods: `methods`, `schema`, `choose-alpha`, `average-lora`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmerge.pipeline.cli.options import JsonOption
from mmerge.pipeline.cli.output import out
from mmerge.pipeline.monitoring.printable import escape


def methods(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the tables of docs/methods.md")
    ] = False,
) -> None:
    """List the merge methods, their parameters and their sources."""
    from mmerge.pipeline.views.catalogue import methods_to_markdown, print_methods

    if as_markdown:
        print(methods_to_markdown(), end="")
    else:
        print_methods(out)


def schema() -> None:
    """Print the JSON schema of recipes, for editors and other validators."""
    from mmerge.pipeline.recipes.schema import make_recipe_schema

    print(json.dumps(make_recipe_schema(), indent=2))


def choose_alpha(
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS",
            help='JSON: {"0.0": ["answer to question 1", …], "0.1": […], …}, by coefficient',
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Choose the coefficient of AdaMMS from a model's answers at several ones, without labels."""
    from mmerge.pipeline.evaluation.answers import read_answers
    from mmerge.workers.methods.adamms import choose_alpha as choose

    choice = choose(read_answers(answers))
    if as_json:
        print(json.dumps(asdict(choice) | {"alpha": choice.alpha}))
        return
    steps = zip(choice.alphas, choice.alphas[1:], choice.differences, strict=False)
    for below, above, num_changed in steps:
        out.print(f"{below:g} to {above:g}: {num_changed} answers change")
    ties = ", ".join(f"{alpha:g}" for alpha in choice.best[1:])
    out.print(f"alpha: [bold]{choice.alpha:g}[/]" + (f" (equally good: {ties})" if ties else ""))


def average_lora(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="folders of LoRA adapters with equal ranks"),
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="folder to write to; new or empty")
    ],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", help="sum, mean, ties-sum, ties-mean, ties-max, tsv, iso, wudi or wudi2"
        ),
    ] = "mean",
    density: Annotated[
        float,
        typer.Option(
            "--density", min=0.0, max=1.0, help="share of the weights that the ties strategies keep"
        ),
    ] = 0.2,
) -> None:
    """Average LoRA factors A and B separately, as the official Model Composition code does.

    For comparison only: the average of the factors is not the average of the products that a model
    is made of. To merge adapters, name them as experts of a recipe.
    """
    from mmerge.workers.exports.lora_average import write_average

    num_factors = write_average(adapters, to, strategy=strategy, density=density)
    out.print(f"wrote {num_factors} factors to {escape(str(to))}")
