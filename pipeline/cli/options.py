"""Arguments and options that several commands share, each defined once, and how values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mmerge.manifests.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from mmerge.pipeline.execution.open import ExecutorName
    from mmerge.workers.composite.routed_linear import Policy

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="recipe file (YAML; keys: 'mmerge schema')")
]
UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="composite: STORE, or STORE#NAME if it has several")
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="compare a small prompt of each expert with its own class while loading",
    ),
]
EncodersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoders",
        metavar="MODULE:FUNCTION",
        help="function that registers your own encoders; may be repeated",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
IdentityOption = Annotated[
    str | None,
    typer.Option(
        "--identity",
        metavar="WHO",
        help=(
            "require a signature by WHO: PEM file of a public key or of trusted certificates, or"
            " the account of a keyless signature"
        ),
        show_default=False,
    ),
]
IssuerOption = Annotated[
    str | None,
    typer.Option(
        "--issuer",
        metavar="URL",
        help="provider of the account of a keyless signature",
        show_default=False,
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help=(
            "recompute everything, compare it with what the store has, and repair what is missing"
            " or damaged there"
        ),
    ),
]
VerifyReusedOption = Annotated[
    bool,
    typer.Option(
        "--verify-reused",
        help="read what is reused and compare its digests; recompute what is damaged",
    ),
]
OnePassOption = Annotated[
    bool,
    typer.Option(
        "--one-pass",
        help=(
            "read each input once where the method allows it: faster, but a bit that flips while"
            " it is read is not noticed"
        ),
    ),
]
ExclusiveOption = Annotated[
    bool,
    typer.Option(
        "--exclusive",
        help="do nothing and exit with 0 while another run of this composite is active",
    ),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option(
        "--task-deadline",
        metavar="SECONDS",
        min=1,
        help=(
            "time after which a task on Ray gets a second attempt on another node [default:"
            " estimated from its size]"
        ),
        show_default=False,
    ),
]
BlockOption = Annotated[
    int | None,
    typer.Option(
        "--block-entries",
        metavar="COUNT",
        help=(
            "weights of a tensor processed at once, a multiple of 65536; changes memory and speed,"
            " not the result [default: 131072]"
        ),
        show_default=False,
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="ray|processes|serial",
        help=(
            "where tasks run: on a Ray cluster, in a process per core of this machine (fastest on"
            " one machine), or in threads of this process"
        ),
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="address of a Ray cluster [default: start a local Ray]",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="tasks at once on this machine, one core each [default: all cores]",
        show_default=False,
    ),
]
ExpertOption = Annotated[
    str | None,
    typer.Option(
        "--expert",
        metavar="NAME",
        help="reconstruct this expert alone (retention) instead of routing by modality",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="packed|resident",
        help=(
            "packed: keep τ⋆ and bit masks, form a modality's weights when needed; resident: keep"
            " the weights of every modality"
        ),
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="bfloat16|float16|float32",
        help="dtype of the loaded weights [default: the build's]",
        show_default=False,
    ),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="prompts per batch")]
TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="maximum length of an answer, in tokens")
]
EXECUTORS: tuple[ExecutorName, ...] = ("ray", "processes", "serial")
POLICIES: tuple[Policy, ...] = ("packed", "resident")
DTYPES = ("bfloat16", "float16", "float32")
GPUS_HELP = "number of devices and memory of each in GB: 4x80, or 2x80,2x40"

_DURATION_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_SIZE_POWERS = {"M": 2, "G": 3, "T": 4}
Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class BuildOptions:
    """Options of `mmerge run` that hold on any machine: `mmerge submit` passes them to its job.

    The others choose where this machine runs its tasks (--executor, --address, --workers,
    --memory); a job runs on the cluster that it was submitted to.
    """

    fresh: bool
    verify_reused: bool
    one_pass: bool
    exclusive: bool
    task_deadline: float | None
    block_entries: int | None

    def to_arguments(self) -> list[str]:
        """Return the options as arguments of `mmerge run`, defaults left out."""
        arguments: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if value is True:
                arguments.append(flag)
            elif value is not None and value is not False:
                arguments += [flag, str(value)]
        return arguments


def check_choice(value: str, choices: Sequence[Choice], *, option: str) -> Choice:
    """Return the value as one of the choices. Raises RecipeError."""
    for choice in choices:
        if value == choice:
            return choice
    quoted = [repr(str(choice)) for choice in choices]
    expected = " or ".join([", ".join(quoted[:-1]), quoted[-1]])
    raise RecipeError(f"{option}: expected {expected}, got {value!r}")


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a --dtype option. Raises RecipeError."""
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, check_choice(name, DTYPES, option="--dtype"))
    return dtype


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes that a size like 1.5GB, 800MB or 2GiB stands for. Raises RecipeError."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([MGT])(i?)B\s*", text)
    if not match:
        raise RecipeError(f"{option}: expected a size such as 1.5GB or 800MB, got {text!r}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** _SIZE_POWERS[match[2]])


def parse_duration(text: str, *, option: str) -> timedelta:
    """Return the time that a text like 7d, 36h or 90m stands for. Raises RecipeError."""
    match = re.fullmatch(r"([0-9]{1,8}(?:\.[0-9]{1,8})?)\s*([smhdw])", text.strip())
    if not match:
        raise RecipeError(f"{option}: expected a time like 7d, 36h or 90m, got {text!r}")
    return timedelta(**{_DURATION_UNITS[match[2]]: float(match[1])})
