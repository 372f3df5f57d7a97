"""`mmerge place`: the memory of each device, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from mmerge.pipeline.cli.options import (
    GPUS_HELP,
    POLICIES,
    BatchOption,
    DtypeOption,
    ExpertOption,
    JsonOption,
    PolicyOption,
    UriArgument,
    check_choice,
    parse_dtype,
)
from mmerge.pipeline.cli.output import out

if TYPE_CHECKING:
    from mmerge.workers.composite.placement import By

WAYS: tuple[By, ...] = ("tensor", "layers")


def place(
    uri: UriArgument,
    gpus: Annotated[str, typer.Option("--gpus", metavar="COUNTxGB", help=GPUS_HELP)],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="tensor|layers",
            help=(
                "tensor: split every matrix over all devices; layers: give each device some layers"
                " [default: tensor for equal devices, if the model can be split]"
            ),
            show_default=False,
        ),
    ] = None,
    policy: PolicyOption = "packed",
    expert: ExpertOption = None,
    dtype: DtypeOption = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="tokens of prompt and answer [default: the model's maximum, at most 4096]",
            show_default=False,
        ),
    ] = None,
    batch: BatchOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Show the memory that a composite needs on each device, without reading tensors.

    The exit code is 1 if it does not fit; the message has the sizes.
    """
    from mmerge.pipeline.views.placement import placement_to_json, print_placement
    from mmerge.workers.composite.placement import parse_devices
    from mmerge.workers.composite.placement_planner import plan_placement

    placement = plan_placement(
        uri,
        devices=parse_devices(gpus),
        by=None if by is None else check_choice(by, WAYS, option="--by"),
        policy=check_choice(policy, POLICIES, option="--policy"),
        expert=expert,
        dtype=parse_dtype(dtype),
        context=context,
        batch=batch,
    )
    if as_json:
        print(json.dumps(placement_to_json(placement), indent=2))
    else:
        print_placement(placement, out)
