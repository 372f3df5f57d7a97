"""The `mmerge` command: options of all commands, exit codes, and how errors are shown."""

from __future__ import annotations

import atexit
import gc
import logging
import signal
import sys
import threading
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.cli.commands import find_target, list_targets, load_function, read_summary

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Merge multimodal LLM experts into one composite model, without training.

You have a base LLM and several experts tuned from it: one for images, one for audio, one for video.
Name them in a recipe, then:

\b
    mmerge plan recipe.yaml
    mmerge run recipe.yaml
    mmerge show STORE
    mmerge generate STORE --image a.png --audio b.wav "What do they have in common?"
    mmerge export STORE --expert image --to DIR

A composite is addressed as STORE, or as STORE#NAME, STORE#NAME@3 or STORE#DIGEST where a store
holds several. After an interruption, the same command continues with the shards that are missing.
"""
EPILOG = (
    "Exit codes: 0 success; 1 an error, explained in one message; 2 wrong usage; 130 interrupted by"
    " Ctrl-C, 143 by SIGTERM (finished shards are kept)."
)
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells count them."""
NOISY_LOGGERS = ("httpx", "transformers", "filelock", "urllib3")


class CommandGroup(TyperGroup):
    """The commands of the registry, each imported when it is called or its own help is shown."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return list(list_targets())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, None if there is none of this name."""
        target = find_target(cmd_name)
        if target is None:
            return None
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(cmd_name)(load_function(cmd_name, target))
        return get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview of commands without importing them."""
        rows = [(name, read_summary(target)) for name, target in list_targets().items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and remaining arguments; a misspelt name gets a suggestion."""
        name = args[0]
        if not name.startswith("-") and find_target(name) is None:
            similar = get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"Did you mean {similar[0]!r}?" if similar else "'mmerge --help' lists them."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


# Plain text: drawing boxes around the help would take half of its time.
app = typer.Typer(
    cls=CommandGroup,
    help=HELP,
    epilog=EPILOG,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_debug = False


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"mmerge {version('mmerge')}")
        raise typer.Exit


@app.callback()
def _set_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="show debug messages and the traceback of an error")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(
            "--log-format",
            metavar="text|json",
            help="log lines for people, or JSON objects for log collectors",
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
    from mmerge.pipeline.cli.options import check_choice

    if check_choice(log_format, ("text", "json"), option="--log-format") == "json":
        from mmerge.pipeline.monitoring.progress import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    logging.getLogger("mmerge").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


_terminated = threading.Event()
"""Set by SIGTERM, which schedulers and `ray job stop` send.

The exit code cannot come from the exception: libraries may replace it on its way up.
"""


def _terminate(number: int, frame: object) -> None:
    _terminated.set()
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Imports and plans create many objects that live as long as the process; collecting garbage
    # among them found nothing and took time. So did the two collections at interpreter exit
    # (0.5 s), which freezing all objects avoids.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = app(arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # click returns this code after Ctrl-C
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
    except Exception as error:  # noqa: BLE001 - users see one line; --debug shows the traceback
        code = _report_unexpected(error)
    sys.exit(code)


def _open_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def _print_error(text: str) -> None:
    from rich.markup import escape

    _open_console().print(f"[red]error:[/] {escape(text)}", highlight=False)


def _report_interrupt() -> int:
    _open_console().print(
        "[yellow]interrupted[/]: finished shards are kept; run the same command again to continue"
    )
    return TERMINATED if _terminated.is_set() else INTERRUPTED


def _report_unexpected(error: Exception) -> int:
    show_usage = getattr(error, "show", None)
    if callable(show_usage):  # an error of usage, raised by click
        show_usage()
        return int(getattr(error, "exit_code", 2))
    if _debug:
        raise error
    lines = str(error).strip().splitlines() or [""]
    _print_error(
        f"{type(error).__name__}: {lines[0]}\nThis is a fault of mmerge or of its environment."
        " 'mmerge --debug COMMAND …' shows where it occurred"
    )
    return 1


if __name__ == "__main__":
    main()
