"""The `semmoe` command: one Typer app whose subcommands live in the commands_* files.

Nothing heavy is imported here: `semmoe --help` must answer at once. Each command imports what it
needs when it runs.
"""

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from semmoe.commands.compare import compare
from semmoe.commands.demo import demo
from semmoe.commands.export import export
from semmoe.commands.hub import pull, push
from semmoe.commands.place import place
from semmoe.commands.report import report
from semmoe.commands.reshard import reshard
from semmoe.commands.route import route
from semmoe.commands.run import run
from semmoe.commands.show import show
from semmoe.commands.trace import trace
from semmoe.commands.try_ import try_
from semmoe.config import HELP, NAMED, takes_common
from semmoe.help import Command, Group
from semmoe.profiles.errors import DEBUG, InputError, show_traceback, visible
from semmoe.profiles.hub.urls import is_network_failure, why
from semmoe.terminal.loudness import USUAL, Quiet, Verbose, detail, set_loudness

app = typer.Typer(
    name="semmoe",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Offline expert placement for Mixture-of-Experts models: record routing, place experts, measure the saved traffic.",
    epilog="Example: semmoe trace --from sglang responses.jsonl.gz -o t; semmoe place t --ranks 4 -o p; semmoe report p t",
)
for command in (demo, trace, place, report, compare, show, reshard, export, run, route, push, pull):
    app.command(cls=Command)(takes_common(command))
app.command("try", cls=Command)(takes_common(try_))


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"semmoe {version('semmoe')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help=f"Show the traceback behind an error of one line; {DEBUG}=1 in the environment does too."
        ),
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help=HELP)] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    context.meta[NAMED] = config
    if not quiet and not verbose:
        set_loudness(USUAL)
    context.call_on_close(partial(_tell_cost, time.monotonic()))
    if debug:
        os.environ[DEBUG] = "1"


def _tell_cost(started: float) -> None:
    """What the command took, in this process and in those that it started."""
    import resource

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    detail(f"{time.monotonic() - started:.1f} s, at most {peak * unit / 1e9:.2f} GB in a process")


def main() -> None:
    """Run the command: a user's mistake is one line on stderr and exit code 1; a bug a traceback.

    With --debug the traceback behind the line comes before it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names that stdout's encoding lacks end no command
    main_of(app if os.environ.get("RANK", "0") == "0" else _run_quietly)


def main_of(command: Callable[[], object]) -> None:
    """Run a command, and end as `main` does."""
    try:
        command()
    except InputError as error:
        _end(error, str(error))
    except SystemExit as end:
        # Typer turns Ctrl-C into exit code 130 without a word; a command that has spoken for itself
        # leaves no such cause.
        cause = getattr(end.__context__, "__cause__", None)
        if isinstance(cause, KeyboardInterrupt):
            show_traceback(cause)
            print("semmoe: interrupted", file=sys.stderr)
        if isinstance(cause, EOFError):  # no command asks on a terminal: it is a bug, which Typer calls "Aborted!"
            raise cause from None
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" {error.filename}" if error.filename else ""  # standard output has no name
        _end(error, f"cannot write{where}: {error.strerror}")
    except Exception as error:
        if is_network_failure(error):
            _end(error, f"another machine cannot be reached: {why(error)}")
        if not _worker_died(error):
            raise
        _end(error, "a worker process died, most often for lack of memory: semmoe place takes --processes 1")


def _run_quietly() -> None:
    """The command on a further rank of torchrun: wrong usage and Ctrl-C are told by rank 0, which
    was called alike."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:  # of wrong usage; its class is not Typer's to give
            raise
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _end(error: BaseException, line: str) -> NoReturn:
    show_traceback(error)
    print(f"semmoe: {visible(line)}", file=sys.stderr)
    sys.exit(1)


def _worker_died(error: Exception) -> bool:
    from concurrent.futures import BrokenExecutor

    return isinstance(error, BrokenExecutor)
