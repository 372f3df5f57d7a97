"""The command line: recipes in, composites out. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.pipeline.cli_calibrate import register as register_calibrate_command
from mmerge.pipeline.cli_cluster import register as register_cluster_commands
from mmerge.pipeline.cli_composite import register as register_composite_commands
from mmerge.pipeline.cli_evaluate import register as register_evaluate_command
from mmerge.pipeline.cli_run import register as register_run_commands
from mmerge.pipeline.cli_store import register as register_store_commands

if TYPE_CHECKING:
    pass

HELP = """Merge multimodal LLM experts into one composite model, without training.

You have a base LLM and several experts tuned from it, one for images, one for audio, one for video. Write a *recipe* that names
them, then:

    mmerge plan recipe.yaml       what is read, written and held in memory
    mmerge run recipe.yaml        merge, here or on a Ray cluster
    mmerge submit recipe.yaml     the same as a job of a Ray cluster
    mmerge show STORE             what was built; how much each expert keeps
    mmerge verify STORE           re-read everything and compare digests
    mmerge place STORE --gpus 4x80     what each device would hold
    mmerge generate STORE --image a.png --audio b.wav "What do they share?"
    mmerge export STORE --expert image --to DIR     for transformers
    mmerge evaluate STORE#a --prompts q.jsonl --to DIR     scores, performance retention
    mmerge calibrate recipe.yaml --prompts q.jsonl     mask scales, without labels
    mmerge diff STORE#a@1 STORE#a@2     what changed ('log' lists builds)
    mmerge gc STORE               what no live build needs
    mmerge copy STORE s3://bucket/merges     a build into another store

A composite is addressed as STORE, or as STORE#NAME, STORE#NAME@3 or STORE#DIGEST where a store holds several.
A run that was killed continues when the same command is given again.
"""
EPILOG = (
    "Exit codes: 0 done; 1 an error, explained in one message; 2 wrong usage; 130 interrupted (143 by SIGTERM), finished shards are kept."
)

app = typer.Typer(
    help=HELP, epilog=EPILOG, rich_markup_mode="markdown", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)
_debug = False

UriArgument = Annotated[str, typer.Argument(metavar="URI", help="the composite: STORE or STORE#NAME")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mmerge {version('mmerge')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error, and debug messages")] = False,
    log_format: Annotated[
        str, typer.Option("--log-format", metavar="text|json", help="lines for people, or JSON objects for collectors")
    ] = "text",
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)] = False,
) -> None:
    global _debug
    _debug = debug
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    if log_format == "json":
        from mmerge.pipeline.progress import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    elif log_format != "text":
        raise RecipeError(f"--log-format: expected 'text' or 'json', got {log_format!r}")
    logging.getLogger("mmerge").setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("httpx", "transformers", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


register_run_commands(app)


@app.command()
def show(
    uri: UriArgument,
    as_json: JsonOption = False,
    layers: Annotated[bool, typer.Option("--layers", help="mask statistics per layer as well")] = False,
) -> None:
    """Show a composite: what it was made from, its masks, and what the experts share. Or list the composites of a store."""
    from mmerge.manifests.reference import list_references, split_uri
    from mmerge.manifests.store import open_store
    from mmerge.pipeline.report import print_build, print_references
    from mmerge.pipeline.show import read_build, read_references, to_json

    store_uri, fragment = split_uri(uri)
    if not fragment and not as_json:
        store = open_store(store_uri)
        if len(list_references(store)) > 1:
            print_references(read_references(store), out, store_uri=store_uri)
            return
    summary = read_build(uri)
    if as_json:
        print(json.dumps(to_json(summary), indent=2))
    else:
        print_build(summary, out, layers=layers)


@app.command()
def verify(
    uri: UriArgument,
    sample: Annotated[float, typer.Option("--sample", help="share of the tensors to read; 1 reads everything")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="which tensors a sample takes; others each time", show_default=False)] = None,
) -> None:
    """Re-read a composite and compare every digest with its manifest. Exit code 1 if anything is damaged, with its name."""
    from mmerge.manifests.verify import verify as verify_build
    from mmerge.pipeline.cli_store import byte_bar
    from mmerge.pipeline.progress import to_size

    with byte_bar("verify", None) as on_bytes:
        report = verify_build(uri, sample=sample, seed=seed, on_bytes=on_bytes)
    report.check()
    read = "all digests equal" if sample == 1 else f"a sample of {sample:.1%} of the tensors, its digests equal"
    out.print(f"[green]verified[/] build {report.build[:12]}: {report.num_objects} objects, {to_size(report.num_bytes)}, {read}")


register_composite_commands(app)


@app.command()
def export(
    uri: UriArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="where to write it: a new or empty folder")],
    expert: Annotated[
        str | None,
        typer.Option("--expert", help="the expert to rebuild; without it, the language model for text alone", show_default=False),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", min=1, help="write a LoRA adapter (PEFT) of this rank instead of whole weights", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="with --lora-rank: the base's checkpoint, of a build that does not hold it", show_default=False),
    ] = None,
) -> None:
    """Write an ordinary Hugging Face checkpoint that transformers loads with from_pretrained, or the merge as a LoRA adapter."""
    from mmerge.pipeline import export as export_checkpoint
    from mmerge.pipeline.progress import to_size

    if lora_rank is not None:
        from mmerge.pipeline.report import print_adapter
        from mmerge.workers.export_adapter import export_adapter

        print_adapter(export_adapter(uri, to, rank=lora_rank, base=base, expert=expert), out)
        return
    if base is not None:
        raise RecipeError("--base has no effect without --lora-rank. Leave it out")
    report = export_checkpoint(uri, to, expert=expert)
    out.print(f"wrote {report.num_tensors} tensors, {to_size(report.num_bytes)}, to {escape(report.folder)}: {', '.join(report.files)}")


@app.command("average-lora")
def average_lora(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="folders of LoRA adapters, of equal ranks")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="where to write the adapter: a new or empty folder")],
    strategy: Annotated[str, typer.Option("--strategy", help="sum, mean, ties-sum, ties-mean, ties-max, tsv, iso, wudi or wudi2")] = "mean",
    density: Annotated[float, typer.Option("--density", min=0.0, max=1.0, help="share that the ties strategies keep")] = 0.2,
) -> None:
    """For comparison only: average LoRA factors A and B separately, as the official Model Composition code does.

    The average of the factors is not the average of the products that a model is made of. To merge adapters, give them as
    experts of a recipe.
    """
    from mmerge.workers.lora_average import write_average

    written = write_average(adapters, to, strategy=strategy, density=density)
    out.print(f"wrote {written} factors to {escape(str(to))}")


@app.command("choose-alpha")
def choose_alpha(
    answers: Annotated[
        Path,
        typer.Argument(metavar="ANSWERS", help='JSON: {"0.0": ["answer to question 1", …], "0.1": […], …}, the same questions for each'),
    ],
    as_json: JsonOption = False,
) -> None:
    """Choose the coefficient of AdaMMS from a model's answers at each of a grid, without labels."""
    from mmerge.pipeline.answers import read_answers
    from mmerge.workers.methods.adamms import choose_alpha as choose

    choice = choose(read_answers(answers))
    if as_json:
        print(json.dumps({"alphas": choice.alphas, "differences": choice.differences, "best": choice.best, "alpha": choice.alpha}))
        return
    for below, above, count in zip(choice.alphas, choice.alphas[1:], choice.differences, strict=False):
        out.print(f"{below:g} to {above:g}: {count} answers change")
    out.print(
        f"alpha: [bold]{choice.alpha:g}[/]"
        + (f" (as good: {', '.join(f'{alpha:g}' for alpha in choice.best[1:])})" if choice.best[1:] else "")
    )


@app.command()
def methods(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the tables of docs/methods.md")] = False,
) -> None:
    """List the merge methods with their parameters and sources."""
    from mmerge.pipeline.catalogue import methods_to_markdown, print_methods

    if as_markdown:
        print(methods_to_markdown(), end="")
    else:
        print_methods(out)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors and for validation elsewhere."""
    from mmerge.pipeline.recipe import make_recipe_schema

    print(json.dumps(make_recipe_schema(), indent=2))


register_store_commands(app)
register_evaluate_command(app)
register_calibrate_command(app)
register_cluster_commands(app)


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells count them."""

_terminated = threading.Event()
"""Set by SIGTERM, which a scheduler or `ray job stop` sends. The exception itself may be made anew on its way through libraries."""


def _terminate(number: int, frame: object) -> None:
    _terminated.set()
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Imports and plans make many objects that live as long as the process: looking through them again and again found nothing.
    gc.set_threshold(100_000, 50, 50)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = app(arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # what the command line's library makes of Ctrl-C
            code = _report_interrupt()
    except MmergeError as error:
        if _debug:
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        code = 1
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = _report_interrupt()
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # noqa: BLE001 - the last door: one line to the user, the traceback with --debug
        code = _report_unknown(error)
    sys.exit(code)


def _report_interrupt() -> int:
    err.print("[yellow]interrupted[/]: finished shards are kept; give the same command again to continue")
    return TERMINATED if _terminated.is_set() else INTERRUPTED


def _report_unknown(error: Exception) -> int:
    show_usage = getattr(error, "show", None)
    if callable(show_usage):
        show_usage()
        return int(getattr(error, "exit_code", 2))
    if _debug:
        raise error
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    err.print(
        f"[red]error:[/] {escape(type(error).__name__)}: {escape(first)}\nThis is not an error we expected; --debug before the command shows where it comes from",
        highlight=False,
    )
    return 1


if __name__ == "__main__":
    main()
