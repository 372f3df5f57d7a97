"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="the composite: STORE or STORE#NAME")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
