"""The commands about a composite at work: where it goes, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from mmerge.manifests.errors import PromptError, RecipeError
from mmerge.pipeline.cli.options import UriArgument

if TYPE_CHECKING:
    from mmerge.workers.composite.model import Composite
    from mmerge.workers.composite.placement import Placement
    from mmerge.workers.composite.process_group import ProcessGroup
    from mmerge.workers.modalities.prompt import Part

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

MAX_PROMPTS_BYTES = 1 << 28
GPUS_HELP = "devices and their memory in GB: 4x80, or 2x80,2x40"
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="packed|resident",
        help="keep τ⋆ and bit masks and form a modality's weights, or keep all weights",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="bfloat16|float16|float32",
        help="of the loaded weights; the build's if absent",
        show_default=False,
    ),
]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="tensor|layers",
        help="cut every matrix, or give each device some layers",
        show_default=False,
    ),
]
ExpertOption = Annotated[
    str | None,
    typer.Option(
        "--expert",
        help="rebuild this expert alone (retention), instead of routing by modality",
        show_default=False,
    ),
]


def _choose(value: str | None, choices: Sequence[str], *, option: str) -> Any:
    if value is not None and value not in choices:
        raise RecipeError(f"{option}: expected {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def _to_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, _choose(name, ("bfloat16", "float16", "float32"), option="--dtype"))


def place(
    uri: UriArgument,
    gpus: Annotated[str, typer.Option("--gpus", metavar="COUNTxGB", help=GPUS_HELP)],
    by: ByOption = None,
    policy: PolicyOption = "packed",
    expert: ExpertOption = None,
    dtype: DtypeOption = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="tokens of prompt and answer; the model's, at most 4096, if absent",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="prompts at once")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Show what each device would hold of a composite. Exit code 1, with the numbers, if it does
    not fit. Reads no tensor.
    """
    from mmerge.workers.composite.placement import parse_devices
    from mmerge.workers.composite.placement_planner import plan_placement

    placement = plan_placement(
        uri,
        devices=parse_devices(gpus),
        by=_choose(by, ("tensor", "layers"), option="--by"),
        policy=_choose(policy, ("packed", "resident"), option="--policy"),
        expert=expert,
        dtype=_to_dtype(dtype),
        context=context,
        batch=batch,
    )
    if as_json:
        print(json.dumps(_placement_to_json(placement), indent=2))
    else:
        _print_placement(placement)


def _placement_to_json(placement: Placement) -> dict[str, Any]:
    from dataclasses import asdict

    devices = [asdict(stage) | {"total": stage.memory.total} for stage in placement.stages]
    keys = ("by", "policy", "context", "batch", "num_ranks")
    return {key: getattr(placement, key) for key in keys} | {"devices": devices}


def _print_placement(placement: Placement) -> None:
    from dataclasses import fields

    from mmerge.pipeline.monitoring.progress import to_size

    table = Table(
        "device",
        "layers",
        "total",
        "of",
        "in detail",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for stage in placement.stages:
        layers = f"{stage.first_layer}–{stage.last_layer}" + (
            " (cut)" if placement.by == "tensor" and placement.num_ranks > 1 else ""
        )
        sizes = {
            field.name.replace("_", " "): getattr(stage.memory, field.name)
            for field in fields(stage.memory)
        }
        detail = ", ".join(
            f"{name} {to_size(num_bytes)}" for name, num_bytes in sizes.items() if num_bytes
        )
        table.add_row(
            stage.device, layers, to_size(stage.memory.total), to_size(stage.capacity), detail
        )
    out.print(table)
    way = (
        f"torchrun --nproc-per-node {placement.num_ranks}"
        if placement.num_ranks > 1
        else "one process"
    )
    out.print(
        f"by {placement.by}, {way}; {placement.context:,} tokens, {placement.batch} at once, policy"
        f" {placement.policy}"
    )


def generate(
    uri: UriArgument,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="what to ask; {image}, {audio}, … in it say where a medium goes",
        ),
    ] = "",
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="an image file; may be repeated", show_default=False),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", help="a sound file; may be repeated", show_default=False),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video",
            help="a video file (animated GIF, WebP or PNG); may be repeated",
            show_default=False,
        ),
    ] = None,
    media: Annotated[
        list[str] | None,
        typer.Option(
            "--media",
            metavar="KIND=FILE",
            help="a file for any other modality, or for an expert by name",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='many at once: JSON lines {"question": "…", "image": ["a.png"], …}',
            show_default=False,
        ),
    ] = None,
    expert: ExpertOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")
    ] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="print the answer as it comes")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            help="draw tokens, at this temperature; greedy without",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="draw from the likeliest tokens of this share",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="draw from so many tokens", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="of drawing; the same seed, the same answer", show_default=False
        ),
    ] = None,
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            metavar="dynamic|static",
            help="keys and values: growing, or allocated at once",
        ),
    ] = "dynamic",
    policy: PolicyOption = "packed",
    dtype: DtypeOption = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", metavar="COUNTxGB", help="spread it: " + GPUS_HELP, show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda, cuda:1, …; cuda with --gpus, else cpu", show_default=False
        ),
    ] = None,
) -> None:
    """Ask a composite about text, images, sounds and videos, alone or together.

    On several GPUs: --gpus spreads the layers over them (--device cpu tries the plan without GPUs);
    started as `torchrun --nproc-per-node N --no-python mmerge generate …` every matrix is cut over
    N processes.
    """
    if prompts and (question or image or audio or video or media or stream):
        raise RecipeError(
            "--prompts: the questions and media stand in the file, and answers come together. Leave"
            " the others out"
        )
    asked = (
        _read_prompts(prompts) if prompts else [(question, _make_parts(image, audio, video, media))]
    )
    if not all(text or parts for text, parts in asked):
        raise RecipeError("generate: give a question, or an --image, --audio or --video")
    options = _sampling(temperature, top_p, top_k, seed) | {
        "cache": _choose(cache, ("dynamic", "static"), option="--cache")
    }
    device = _choose_device(device, gpus)
    from mmerge.workers.composite.process_group import open_process_group

    group = open_process_group(device=device)
    with _closing(group), _one_voice(group):
        composite = _load(uri, group, expert, device, policy, dtype, gpus)
        made = [composite.prompt(text, parts) for text, parts in asked]
        if stream:
            for piece in composite.stream(made[0], max_new_tokens=max_new_tokens, **options):
                _say(group, piece, end="")
            _say(group, "")
        else:
            for answer in composite.generate_batch(made, max_new_tokens=max_new_tokens, **options):
                _say(group, answer)


def _choose_device(device: str | None, gpus: str | None) -> str:
    """Return where to load: on GPUs if memory of GPUs is given and nothing else is said."""
    if gpus and (device or "").startswith("cuda:"):
        raise RecipeError(
            f"--device: --gpus takes devices from cuda:0 on, {device!r} would have no effect. Give"
            " --device cuda, or leave it out"
        )
    return device or ("cuda" if gpus else "cpu")


@contextmanager
def _closing(group: ProcessGroup) -> Iterator[None]:
    """End the exchange with the other ranks whatever happens: its threads must not outlive the
    work.
    """
    try:
        yield
    except BaseException:
        group.close(wait=False)
        raise
    group.close()


def _say(group: ProcessGroup, text: str, *, end: str = "\n") -> None:
    if group.rank == 0:
        print(text, end=end, flush=True)


@contextmanager
def _one_voice(group: ProcessGroup) -> Iterator[None]:
    """Let rank 0 alone report what is wrong with a prompt: all of them find it."""
    try:
        yield
    except PromptError:
        if group.rank == 0:
            raise
        raise typer.Exit(1) from None


def _load(
    uri: str,
    group: ProcessGroup,
    expert: str | None,
    device: str,
    policy: str,
    dtype: str | None,
    gpus: str | None,
) -> Composite:
    from mmerge.pipeline import load_composite
    from mmerge.workers.composite.placement import parse_devices
    from mmerge.workers.composite.placement_planner import plan_placement

    chosen = _choose(policy, ("packed", "resident"), option="--policy")
    placement = None
    if gpus:
        by: Literal["tensor", "layers"] = "tensor" if group.num_ranks > 1 else "layers"
        kind = "cuda" if device.startswith("cuda") else "cpu"
        placement = plan_placement(
            uri,
            devices=parse_devices(gpus),
            by=by,
            policy=chosen,
            expert=expert,
            dtype=_to_dtype(dtype),
            device_type=kind,
        )
    if group.num_ranks > 1 and device == "cuda":
        import torch

        device = f"cuda:{torch.cuda.current_device()}"
    with _bar(group) as on_bytes:
        return load_composite(
            uri,
            mode="retention" if expert else "expansion",
            expert=expert,
            device=device,
            dtype=_to_dtype(dtype),
            policy=chosen,
            placement=placement,
            group=group,
            on_bytes=on_bytes,
        )


@contextmanager
def _bar(group: ProcessGroup) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal what rank 0 has read, and how fast; elsewhere nothing."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    if not err.is_terminal or group.rank:
        yield lambda num_bytes, total: None
        return
    label = "load" if group.num_ranks == 1 else f"load (rank 0 of {group.num_ranks})"
    with Progress(
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=err,
        transient=True,
    ) as bars:
        task = bars.add_task(label, total=None)
        yield lambda num_bytes, total: bars.update(task, completed=num_bytes, total=total)


def _sampling(
    temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> dict[str, Any]:
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in drawing.items() if value is not None}
    if temperature == 0:
        raise RecipeError("--temperature 0 is greedy: leave it out")
    if not given and seed is not None:
        raise RecipeError(
            "--seed has no effect on greedy answers; give --temperature, --top-p or --top-k, or"
            " leave it out"
        )
    return given | ({"do_sample": True, "seed": seed} if given else {})


def _make_parts(
    image: list[Path] | None,
    audio: list[Path] | None,
    video: list[Path] | None,
    media: list[str] | None,
) -> list[Part]:
    from mmerge.workers.modalities.prompt import Part

    parts = [
        Part(kind, path)
        for kind, paths in (("image", image), ("audio", audio), ("video", video))
        for path in paths or []
    ]
    for pair in media or []:
        kind, equals, path = pair.partition("=")
        if not equals or not kind or not path:
            raise RecipeError(f"--media: expected KIND=FILE, got {pair!r}")
        _refuse_text(kind, where="--media")
        parts.append(Part(kind, path))
    return parts


def _refuse_text(kind: str, *, where: str) -> None:
    if kind in ("text", "ids"):  # what parts of a prompt are beside media
        raise RecipeError(f"{where}: {kind!r} is no medium. Put the text into the question")


def _read_prompts(path: Path) -> list[tuple[str, list[Part]]]:
    """Return question and media of each line; relative files are looked for beside the file of
    prompts.
    """
    from mmerge.manifests.digest import parse_json
    from mmerge.workers.modalities.prompt import Part

    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise RecipeError(f"--prompts: {path} has more than {MAX_PROMPTS_BYTES:,} bytes")
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # other line ends may stand in a string of JSON
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"--prompts: {path} is no UTF-8 text ({error}). Save it as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(f"--prompts: {path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"--prompts: {path}, line {number}"
        if not line.strip():
            continue
        try:
            raw = parse_json(line.encode(), what="prompt")
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("question", ""), str):
            raise RecipeError(
                f'{where}: expected an object like {{"question": "…", "image": ["a.png"]}}'
            )
        parts = []
        for kind, files in raw.items():
            if kind == "question":
                continue
            files = [files] if isinstance(files, str) else files
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise RecipeError(f"{where}: {kind}: expected a file or a list of files")
            _refuse_text(kind, where=where)
            parts += [Part(kind, path.parent / file) for file in files]
        found.append((cast("str", raw.get("question", "")), parts))
    if not found:
        raise RecipeError(f"--prompts: {path} has no prompts")
    return found
