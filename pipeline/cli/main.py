"""The command line: recipes in, composites out. A command's module is imported when the command is
called, or its own help is asked for.
"""

from __future__ import annotations

import atexit
import gc
import logging
import signal
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from mmerge.manifests.errors import MmergeError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Merge multimodal LLM experts into one composite model, without training.

You have a base LLM and several experts tuned from it, one for images, one for audio, one for video. Write a recipe that names
them, then:

\b
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
    "Exit codes: 0 done; 1 an error, explained in one message; 2 wrong usage; 130 interrupted (143"
    " by SIGTERM), finished shards are kept."
)

COMMANDS = {
    "plan": (
        "cli.run",
        (
            "Show what a run would read, write and hold in memory, and which shards it would"
            " compute. Reads headers and the store."
        ),
    ),
    "run": (
        "cli.run",
        (
            "Build the composite of a recipe. A killed run continues; a second run of the same"
            " recipe does nothing and says so."
        ),
    ),
    "show": (
        "cli.store",
        (
            "Show a composite: what it was made from, its masks, and what the experts share. Or"
            " list the composites of a store."
        ),
    ),
    "verify": (
        "cli.store",
        (
            "Re-read a composite and compare every digest with its manifest. Exit code 1 if"
            " anything is damaged, with its name."
        ),
    ),
    "place": (
        "cli.composite",
        (
            "Show what each device would hold of a composite. Exit code 1, with the numbers, if it"
            " does not fit. Reads no tensor."
        ),
    ),
    "generate": (
        "cli.composite",
        "Ask a composite about text, images, sounds and videos, alone or together.",
    ),
    "export": (
        "cli.store",
        (
            "Write an ordinary Hugging Face checkpoint that transformers loads with"
            " from_pretrained, or the merge as a LoRA adapter."
        ),
    ),
    "average-lora": (
        "cli.methods",
        (
            "For comparison only: average LoRA factors A and B separately, as the official Model"
            " Composition code does."
        ),
    ),
    "choose-alpha": (
        "cli.methods",
        (
            "Choose the coefficient of AdaMMS from a model's answers at each of a grid, without"
            " labels."
        ),
    ),
    "methods": ("cli.methods", "List the merge methods with their parameters and sources."),
    "schema": (
        "cli.methods",
        "Print the JSON schema of recipes, for editors and for validation elsewhere.",
    ),
    "diff": (
        "cli.store",
        (
            "Show what changed from one build to another: inputs, numbers, objects, statistics per"
            " layer."
        ),
    ),
    "log": (
        "cli.store",
        "List the builds behind a name, newest first: when, from what, by which versions.",
    ),
    "gc": (
        "cli.store",
        (
            "Delete what no live build needs. A dry run unless --delete is given; refuses while a"
            " run uses the store."
        ),
    ),
    "copy": (
        "cli.store",
        (
            "Copy a build into another store, only what is missing there; every byte is checked on"
            " its way."
        ),
    ),
    "push": (
        "cli.store",
        "Upload a composite or an exported checkpoint to the Hugging Face Hub, in one commit.",
    ),
    "evaluate": (
        "cli.evaluate",
        (
            "Ask models the same questions and score them: exact match, multiple choice (MCUB too),"
            " captions by ROUGE-L."
        ),
    ),
    "calibrate": (
        "cli.calibrate",
        (
            "Choose mask scales (and density) from a few prompts without labels: by agreement with"
            " the experts' own answers."
        ),
    ),
    "submit": (
        "cli.cluster",
        (
            "Build a recipe as a job of a Ray cluster: this package goes along, the log comes back."
            " Ctrl-C leaves the job running."
        ),
    ),
    "jobs": ("cli.cluster", "List the builds among the jobs of a Ray cluster."),
    "status": (
        "cli.cluster",
        (
            "Tell how far the last run of a composite is, from any machine that can read its store."
            " Exit code 1 if it failed."
        ),
    ),
}
"""By name: the module that has the function of that name, and the first paragraph of the function's
docstring.
"""


class _Later(TyperCommand):
    """A command of which only the name and a line of help are known; the real one takes its place
    when it is called.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Return the context of the real command."""
        return _load_command(str(self.name)).make_context(info_name, args, parent, **extra)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the whole line: the list of commands breaks it where it is too long."""
        return self.help or ""


def _load_command(name: str) -> Any:
    module = import_module(f"mmerge.pipeline.{COMMANDS[name][0]}")
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(getattr(module, name.replace("-", "_")))
    return get_command(alone)


def _make_app() -> typer.Typer:
    # Help is plain text: what draws boxes around it would be half of the time until it is there.
    made = typer.Typer(
        help=HELP,
        epilog=EPILOG,
        rich_markup_mode=None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, (_, line) in COMMANDS.items():
        made.command(name, cls=_Later, help=line)(lambda: None)
    return made


app = _make_app()
_debug = False


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mmerge {version('mmerge')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of an error, and debug messages")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(
            "--log-format",
            metavar="text|json",
            help="lines for people, or JSON objects for collectors",
        ),
    ] = "text",
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version and exit", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    if log_format == "json":
        from mmerge.pipeline.monitoring.progress import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    elif log_format != "text":
        raise RecipeError(f"--log-format: expected 'text' or 'json', got {log_format!r}")
    logging.getLogger("mmerge").setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("httpx", "transformers", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells count them."""

_terminated = threading.Event()
"""Set by SIGTERM, which a scheduler or `ray job stop` sends. The exception itself may be made anew
on its way through libraries.
"""


def _terminate(number: int, frame: object) -> None:
    _terminated.set()
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Imports and plans make many objects that live as long as the process: looking through them
    # again and again found nothing.
    gc.set_threshold(100_000, 50, 50)
    # So did looking through them twice as the process ends, which took half a second: its memory
    # goes back to the system as it is.
    atexit.register(gc.freeze)
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
        _print_error(str(error))
        code = 1
    except (KeyboardInterrupt, typer.Abort, EOFError):
        code = _report_interrupt()
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # noqa: BLE001 - the last door: one line to the user, the traceback with --debug
        code = _report_unknown(error)
    sys.exit(code)


def _open_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def _print_error(text: str) -> None:
    from rich.markup import escape

    _open_console().print(f"[red]error:[/] {escape(text)}", highlight=False)


def _report_interrupt() -> int:
    _open_console().print(
        "[yellow]interrupted[/]: what was finished of a build is kept; give the same command again"
        " to continue or to begin anew"
    )
    return TERMINATED if _terminated.is_set() else INTERRUPTED


def _report_unknown(error: Exception) -> int:
    show_usage = getattr(error, "show", None)
    if callable(show_usage):
        show_usage()
        return int(getattr(error, "exit_code", 2))
    if _debug:
        raise error
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    _print_error(
        f"{type(error).__name__}: {first}\nThis is not an error we expected; --debug before the"
        " command shows where it comes from"
    )
    return 1


if __name__ == "__main__":
    main()
