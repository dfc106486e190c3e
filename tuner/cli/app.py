"""The application: its commands, and how errors become one message and an exit code."""

import sys
import traceback
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from tuner.cli import (
    calibrate,
    doctor,
    explain,
    export,
    init,
    lint,
    plan,
    probe,
    replay,
    show,
    sweep,
    sync,
    trial,
    ui,
)
from tuner.errors import MegatuneError

DESCRIPTION = """Find the fastest way to lay a Megatron training job over a cluster, by running it.

Exit codes: 0 a best layout was measured (or the command did its work), 1 our own error, 2 bad input, \
3 nothing feasible ran, 4 stopped by the circuit breaker, 130 interrupted with everything kept.
"""

# Click's ClickException, or that of the copy of click that newer typers carry: typer names neither.
_CommandLineError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help=DESCRIPTION, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for command in (
    init,
    lint,
    plan,
    explain,
    sweep,
    trial,
    replay,
    show,
    export,
    ui,
    sync,
    doctor,
    calibrate,
    probe,
):
    name = command.__name__.rsplit(".", 1)[-1]
    app.command(name)(getattr(command, name))


@app.callback()
def options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Options of every command."""


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code. Never lets an exception out."""
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        code = app(arguments, prog_name="megatune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MegatuneError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        return error.exit_code
    except _CommandLineError as error:
        error.show()
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        stderr.print(
            f"[bold red]internal error:[/] {escape(type(error).__name__)}: {escape(str(error))}\n"
            "This is a bug in megatune, not in your input: run `megatune --debug ...` and report the traceback."
        )
        return 1
