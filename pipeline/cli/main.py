"""The `mmerge` command: options of all commands, exit codes, and how errors are shown."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import signal
import sys
import threading
from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.cli.commands import find_target, list_targets, load_function, read_summary
from mmerge.pipeline.cli.streams import (
    discard_stdout,
    flush_stdout,
    is_closed_pipe,
    prepare_streams,
)

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
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
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
    from mmerge.pipeline.cli.options import check_choice
    from mmerge.pipeline.monitoring.printable import PlainFormatter

    plain_handler = logging.StreamHandler(sys.stderr)
    plain_handler.setFormatter(PlainFormatter(LOG_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[plain_handler])
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
    prepare_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = app(arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
        flush_stdout()
        if code == INTERRUPTED:  # click returns this code after Ctrl-C
            code = _report_interrupt()
    except MmergeError as error:
        if _debug:
            _print_traceback(error)
        else:
            _print_error(str(error))
        code = 1
    except KeyboardInterrupt:
        code = _report_interrupt()
    except typer.Abort as abort:
        # The command line turns every EOFError into this. One is no Ctrl-C: a file ended too soon.
        cause = abort.__cause__
        code = _report_unexpected(cause) if isinstance(cause, EOFError) else _report_interrupt()
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # noqa: BLE001 - users see one line; --debug shows the traceback
        code = _report_unexpected(error)
    sys.exit(code)


def _print_error(text: str) -> None:
    from mmerge.pipeline.cli.output import err
    from mmerge.pipeline.monitoring.printable import escape

    with suppress(OSError):  # stderr may be full or closed as well
        err.print(f"[red]error:[/] {escape(text)}", highlight=False)


def _print_traceback(error: BaseException) -> None:
    """Print what Python prints of an error; libraries put URLs with passwords into theirs."""
    import traceback

    from mmerge.pipeline.monitoring.printable import escape_controls

    with suppress(OSError):
        sys.stderr.write(escape_controls("".join(traceback.format_exception(error))))
        sys.stderr.flush()


def _report_interrupt() -> int:
    from mmerge.pipeline.cli.output import err

    with suppress(OSError):
        err.print(
            "[yellow]interrupted[/]: finished shards are kept; run the same command again to"
            " continue"
        )
    return TERMINATED if _terminated.is_set() else INTERRUPTED


def _report_unexpected(error: Exception) -> int:
    show_usage = getattr(error, "show", None)
    if callable(show_usage):  # an error of usage, raised by click
        show_usage()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError):
        discard_stdout()
    if _debug:
        _print_traceback(error)
        return 1
    if is_closed_pipe(error):
        return 1  # nobody reads the output any more
    explanation = _explain(error)
    if explanation:
        _print_error(explanation)
        return 1
    lines = str(error).strip().splitlines() or [""]
    _print_error(
        f"{type(error).__name__}: {lines[0]}\nThis is a fault of mmerge or of its environment."
        " 'mmerge --debug COMMAND …' shows where it occurred"
    )
    return 1


def _explain(error: Exception) -> str:
    """Return what a user can do about an error of the machine, empty for any other error."""
    if isinstance(error, MemoryError):
        return (
            "MemoryError: the process got no more memory. Give it more, or use smaller inputs"
            " (--memory and --workers limit a build)"
        )
    if isinstance(error, RecursionError):
        return "RecursionError: an input is nested too deeply. Give one with fewer levels"
    if isinstance(error, UnicodeError):
        return (
            f"{type(error).__name__}: a name or text holds characters that cannot be encoded"
            f" ({error}). Rename it"
        )
    if isinstance(error, OSError) and error.strerror:
        remedy = _OS_REMEDIES.get(error.errno or 0, "Check the path and its permissions")
        subject = f"{error.filename}: " if error.filename else ""
        return f"{type(error).__name__}: {subject}{error.strerror}. {remedy}"
    return ""


_OS_REMEDIES = {
    errno.ENOSPC: "Free some space on the disk that is written to",
    errno.EDQUOT: "Free some space, or ask for a larger quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Close other programs: the system has no more open files",
    errno.ENOMEM: "Give the process more memory",
    errno.EAGAIN: "Raise the limit on processes (ulimit -u)",
    errno.EROFS: "Choose a place that can be written to",
}


if __name__ == "__main__":
    main()
