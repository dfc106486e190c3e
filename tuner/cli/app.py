"""The application: it lists the commands, and turns every error into one message and an exit code."""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from tuner.cli.streams import use_lasting_streams
from tuner.cli.terminal import Terminal
from tuner.errors import CircuitBreakerError, MegatuneError, machine_at_fault

DESCRIPTION = """Find the fastest way to lay a Megatron training job over a cluster, by running it.

Exit codes: 0 a best layout was measured (or the command did its work), 1 an error of megatune itself, 2 bad input, \
3 nothing feasible ran, 4 stopped because the machine fails (a full disk, say), 130 interrupted with everything kept.
"""

# The base class of the errors of a command line, ClickException. Newer typers carry their own copy of click, and typer
# exports neither class, so it is taken from the bases of BadParameter: BadParameter, UsageError, ClickException.
_CommandLineError: Any = typer.BadParameter.__mro__[2]

PROGRAM = "megatune"
"""The program's name in help and in the completion script, also where it runs as `python -m tuner`."""


def _print_version(is_wanted: bool) -> None:
    """Print `megatune 0.1.0` and end the command line, if `--version` is given."""
    if not is_wanted:
        return
    try:
        text = version("megatune")
    except PackageNotFoundError:
        # A checkout on PYTHONPATH, as under Slurm, has no package version.
        text = "(not installed as a package, so without a version)"
    sys.stdout.write(f"megatune {text}\n")
    raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options of every command."""


COMMANDS: Final = (
    "init",
    "lint",
    "plan",
    "explain",
    "sweep",
    "trial",
    "replay",
    "show",
    "stop",
    "pause",
    "resume",
    "export",
    "ui",
    "sync",
    "doctor",
    "calibrate",
    "probe",
)
"""The commands, in the order in which `--help` lists them. Each is a function in the module of its name."""


def _application(commands: Sequence[str]) -> typer.Typer:
    """Build the application with these commands."""
    application = typer.Typer(help=DESCRIPTION, no_args_is_help=True, pretty_exceptions_enable=False)
    application.callback()(_options)
    for name in commands:
        module = import_module(f"tuner.cli.{name}")
        application.command(name)(getattr(module, name))
    return application


def _commands_for(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the command that a command line names, since to import the others takes a second; or else all."""
    first = next((word for word in arguments if word != "--debug"), "")
    return (first,) if first in COMMANDS else COMMANDS


def main() -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    command = next((word for word in arguments if not word.startswith("-")), "")
    # What a sweep prints is in its results folder too; other commands print what they were asked for.
    use_lasting_streams(stdout_must_arrive=command != "sweep")
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; every exception becomes a message on stderr."""
    stderr = Terminal(stderr=True, soft_wrap=True, highlight=False)
    try:
        app = _application(_commands_for(arguments))
        code = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as ended:
        # typer exits by itself after it has answered the shell's completion, or installed or shown its script.
        return ended.code if isinstance(ended.code, int) else 1
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
    except OSError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        stderr.print(f"[bold red]error:[/] {escape(machine_at_fault(error))}")
        return CircuitBreakerError.exit_code
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        stderr.print(
            f"[bold red]internal error:[/] {escape(type(error).__name__)}: {escape(str(error))}\n"
            "This is a bug in megatune, not in your input: run `megatune --debug ...` and report the traceback."
        )
        return 1
