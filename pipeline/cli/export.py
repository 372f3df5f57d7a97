"""`mmerge export`: an ordinary checkpoint, or a LoRA adapter, out of a composite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.cli.options import UriArgument
from mmerge.pipeline.cli.output import out
from mmerge.pipeline.monitoring.printable import escape


def export(
    uri: UriArgument,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="folder to write to; new or empty")
    ],
    expert: Annotated[
        str | None,
        typer.Option(
            "--expert",
            metavar="NAME",
            help="expert to reconstruct [default: the language model, for text]",
            show_default=False,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            min=1,
            help="write a LoRA adapter (PEFT) of this rank instead of a checkpoint",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="URI",
            help="with --lora-rank: the base's checkpoint, if the build does not contain the base",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a Hugging Face checkpoint that transformers loads with from_pretrained.

    With --lora-rank, write the merge as a LoRA adapter of the base.
    """
    from mmerge.pipeline.monitoring.progress import to_size
    from mmerge.pipeline.views.build_report import print_adapter

    if lora_rank is not None:
        from mmerge.workers.exports.lora import export_adapter

        print_adapter(export_adapter(uri, to, rank=lora_rank, base=base, expert=expert), out)
        return
    if base is not None:
        raise RecipeError("--base: has no effect without --lora-rank. Leave it out")
    from mmerge.workers.exports.checkpoint import export as export_checkpoint

    report = export_checkpoint(uri, to, expert=expert)
    out.print(
        f"wrote {report.num_tensors} tensors, {to_size(report.num_bytes)}, to"
        f" {escape(report.folder)}: {escape(', '.join(report.files))}"
    )
