"""`mmerge generate`: answers of a composite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmerge.manifests.errors import PromptError, RecipeError
from mmerge.pipeline.cli.options import (
    GPUS_HELP,
    POLICIES,
    CheckOption,
    DtypeOption,
    EncodersOption,
    ExpertOption,
    PolicyOption,
    TokensOption,
    UriArgument,
    check_choice,
    parse_dtype,
)
from mmerge.pipeline.cli.output import print_text, show_bytes

if TYPE_CHECKING:
    from mmerge.workers.composite.model import Composite
    from mmerge.workers.composite.process_group import ProcessGroup
    from mmerge.workers.composite.routed_linear import Policy


def generate(
    uri: UriArgument,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="the question; {image}, {audio}, … in it mark the places of the files",
        ),
    ] = "",
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="image file; may be repeated", show_default=False),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", help="audio file; may be repeated", show_default=False),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video",
            help="video file (MP4, WebM; animated GIF, WebP or PNG); may be repeated",
            show_default=False,
        ),
    ] = None,
    media: Annotated[
        list[str] | None,
        typer.Option(
            "--media",
            metavar="KIND=FILE",
            help=(
                "file of another modality, or for the expert of this name; of several experts of"
                " one modality the first reads its files; may be repeated"
            ),
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='many prompts: JSON lines {"question": "…", "image": ["a.png"], …}',
            show_default=False,
        ),
    ] = None,
    expert: ExpertOption = None,
    max_new_tokens: TokensOption = 64,
    stream: Annotated[
        bool, typer.Option("--stream", help="print the answer while it is generated")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            help="sample at this temperature [default: greedy]",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="sample from the most likely tokens of this total probability",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=1, help="sample from so many most likely tokens", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="seed of the sampling", show_default=False)
    ] = None,
    encoders: EncodersOption = None,
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            metavar="dynamic|static",
            help="key-value cache: grown token by token, or allocated at once",
        ),
    ] = "dynamic",
    policy: PolicyOption = "packed",
    dtype: DtypeOption = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="COUNTxGB",
            help=f"spread the layers over devices; {GPUS_HELP}",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="cpu, cuda, cuda:1, … [default: cuda with --gpus, else cpu]",
            show_default=False,
        ),
    ] = None,
    check: CheckOption = True,
) -> None:
    """Ask a composite about text, images, audio and video, alone or together.

    On several GPUs, --gpus spreads the layers (add --device cpu to try the plan without GPUs).
    Started as 'torchrun --nproc-per-node N --no-python mmerge generate …', N processes split every
    matrix (tensor parallel).
    """
    from mmerge.pipeline.cli.prompt_file import AskedPrompt, make_parts, read_prompts

    if prompts and (question or image or audio or video or media or stream):
        raise RecipeError(
            "--prompts: cannot be combined with a question, files or --stream: questions and files"
            " come from the prompt file. Leave the others out"
        )
    if prompts:
        asked = read_prompts(prompts)
    else:
        parts = make_parts(
            image=image or (), audio=audio or (), video=video or (), media=media or ()
        )
        asked = [AskedPrompt(question, parts)]
    if not all(prompt.question or prompt.parts for prompt in asked):
        raise RecipeError("generate: give a question, or an --image, --audio or --video")
    options = _make_sampling_options(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    options["cache"] = check_choice(cache, ("dynamic", "static"), option="--cache")
    loading_policy = check_choice(policy, POLICIES, option="--policy")
    device = _choose_device(device, gpus)
    from mmerge.workers.tasks.answer import register_from

    for target in encoders or ():
        register_from(target)
    from mmerge.workers.composite.process_group import open_process_group

    group = open_process_group(device=device)
    with _closing(group), _report_once(group):
        composite = _load(
            uri,
            group,
            expert=expert,
            device=device,
            policy=loading_policy,
            dtype=parse_dtype(dtype),
            gpus=gpus,
            check=check,
        )
        made_prompts = []
        for prompt in asked:
            with _named(prompt.where):
                made_prompts.append(composite.prompt(prompt.question, prompt.parts))
        if stream:
            for piece in composite.stream(
                made_prompts[0], max_new_tokens=max_new_tokens, **options
            ):
                _print_once(group, piece, end="")
            _print_once(group, "")
            return
        with _named(*(prompt.where for prompt in asked)):
            answers = composite.generate_batch(
                made_prompts, max_new_tokens=max_new_tokens, **options
            )
        for answer in answers:
            _print_once(group, answer)


def _choose_device(device: str | None, gpus: str | None) -> str:
    """Return the device to load on: cuda if --gpus is given without --device, else cpu."""
    if gpus and (device or "").startswith("cuda:"):
        raise RecipeError(
            f"--device: --gpus starts at cuda:0, so {device!r} would have no effect. Give"
            " --device cuda, or leave it out"
        )
    return device or ("cuda" if gpus else "cpu")


def _make_sampling_options(
    *, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> dict[str, Any]:
    """Return the options of `generate_batch` that choose tokens; empty for greedy answers."""
    if temperature == 0:
        raise RecipeError("--temperature: 0 means greedy answers. Leave it out")
    candidates = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    options: dict[str, Any] = {
        name: value for name, value in candidates.items() if value is not None
    }
    if options:
        return options | {"do_sample": True, "seed": seed}
    if seed is not None:
        raise RecipeError(
            "--seed: has no effect on greedy answers. Add --temperature, --top-p or --top-k, or"
            " leave it out"
        )
    return {}


@contextmanager
def _closing(group: ProcessGroup) -> Iterator[None]:
    """Close the process group on every way out; after an error without waiting for other group."""
    try:
        yield
    except BaseException:
        group.close(wait=False)
        raise
    group.close()


def _print_once(group: ProcessGroup, text: str, *, end: str = "\n") -> None:
    if group.rank == 0:
        print_text(text, end=end)


@contextmanager
def _named(*places: str) -> Iterator[None]:
    """Let an error of one of several prompts begin with its place, such as a line of a file."""
    try:
        yield
    except PromptError as error:
        index = error.index if len(places) > 1 else 0
        if index is None or not places[index]:
            raise
        raise PromptError(f"{places[index]}: {Exception.__str__(error)}") from error


@contextmanager
def _report_once(group: ProcessGroup) -> Iterator[None]:
    """Report prompt errors from rank 0 only; every rank raises the same error."""
    try:
        yield
    except PromptError:
        if group.rank == 0:
            raise
        raise typer.Exit(1) from None


def _load(
    uri: str,
    group: ProcessGroup,
    *,
    expert: str | None,
    device: str,
    policy: Policy,
    dtype: Any,
    gpus: str | None,
    check: bool,
) -> Composite:
    from mmerge.workers.composite.loader import load_composite
    from mmerge.workers.composite.placement import parse_devices
    from mmerge.workers.composite.placement_planner import plan_placement

    placement = None
    if gpus:
        placement = plan_placement(
            uri,
            devices=parse_devices(gpus),
            by="tensor" if group.num_ranks > 1 else "layers",
            policy=policy,
            expert=expert,
            dtype=dtype,
            device_type="cuda" if device.startswith("cuda") else "cpu",
        )
    if group.num_ranks > 1 and device == "cuda":
        import torch

        device = f"cuda:{torch.cuda.current_device()}"
    label = "load" if group.num_ranks == 1 else f"load (rank 0 of {group.num_ranks})"
    with show_bytes(label, enabled=group.rank == 0) as bar:
        return load_composite(
            uri,
            mode="retention" if expert else "expansion",
            expert=expert,
            device=device,
            dtype=dtype,
            policy=policy,
            placement=placement,
            group=group,
            check=check,
            on_bytes=bar.update,
        )
