"""Imports a program once and forks torchrun jobs that need it: `python -m launchers.local.fork_server MODULE`.

Importing torch and Megatron takes longer than most trials. The server reads requests from its standard input, one line
of JSON per job (`ForkRequest`), and writes answers as lines of JSON to its original standard output (`ForkAnswer`).
It runs one job at a time. A job is torchrun's own agent, which runs in a fork of the server with the job's torchrun
arguments; the ranks are forks of the agent. As in a job that is not forked (`ColdJob`), each rank is a process with its
own CUDA context and log files.

A fork of a process that has used CUDA cannot use CUDA. So if one of the imports has used CUDA, the server runs no job.
And while the agent runs, torch reports to it that there is no CUDA device, since torchrun itself may ask for devices.

When the input ends, the client is gone, and the server ends its job and itself. While the server imports, which takes
many seconds on a busy machine, it cannot read its input; during that time the kernel kills it if the thread that
started it dies.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn, TypedDict

from launchers.guard import adopt_orphans, end_descendants, reap, wait_for_end
from launchers.local.fork_cuda import has_used_cuda, hidden_cuda

_PR_SET_PDEATHSIG = 1
"""An option of prctl, from linux/prctl.h."""


class ForkRequest(TypedDict):
    """A request to start one torchrun job."""

    argv: list[str]
    """The arguments of torchrun, without its own name."""
    env: dict[str, str]
    """All environment variables of the job."""
    folder: str
    """The working directory."""
    output: str
    """The file to which the agent's stdout and stderr are appended."""


class ForkAnswer(TypedDict):
    """What the server reports to its client."""

    event: Literal["ready", "cannot fork", "started", "ended"]
    """`ready`: the module is imported. `cannot fork`: its import has used CUDA, and no job will be forked. `started`: a
    job's agent has started. `ended`: a job's agent has ended."""
    value: int
    """`ready` and `cannot fork`: the server's process id. `started`: the agent's process id. `ended`: the agent's exit
    code, negative for a signal."""


def main(module: str) -> int:
    """Import `module`, then fork a job for each request on the standard input until the input ends; return 0.

    If the import has used CUDA, report `cannot fork` and return 0 at once.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    # What a job or an import prints must not get among the answers.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    adopt_orphans()
    _die_with_parent(signal.SIGKILL)
    if _has_ended(requests.fileno()):  # the client died before the line above
        return 0
    importlib.import_module("launchers.local.agent")
    importlib.import_module(module)
    _die_with_parent(0)  # from here on, a sudden death would leave a job running
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page it touches
    if has_used_cuda():
        _answer(answers, {"event": "cannot fork", "value": os.getpid()})
        return 0
    _answer(answers, {"event": "ready", "value": os.getpid()})
    while line := requests.readline():
        reap()
        pid = os.fork()
        if not pid:
            requests.close()
            os.close(answers)
            _become_job(json.loads(line))
        _answer(answers, {"event": "started", "value": pid})
        code = wait_for_end(pid, requests.fileno())  # the client sends no request while a job runs
        if code is None:
            break
        _answer(answers, {"event": "ended", "value": code})
    end_descendants()
    return 0


def _die_with_parent(number: int) -> None:
    """Have the kernel send this process the signal `number` when the thread that started it dies; 0 for no signal."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _has_ended(requests: int) -> bool:
    poll = select.poll()
    poll.register(requests, 0)  # a hang-up is reported without being asked for
    return bool(poll.poll(0))


def _answer(answers: int, answer: ForkAnswer) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


def _become_job(request: ForkRequest) -> NoReturn:
    """Run torchrun's agent for a request in this fork of the server, then exit with the agent's exit code."""
    code = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["env"])
        code = _run(request["argv"])
    except BaseException:  # this fork must not return into the server's loop
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(argv: list[str]) -> int:
    # `main` has imported these modules already. An import at the top would load torch with this file.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from launchers.local.agent import register_loopback

    register_loopback()
    arguments: Any = torchrun.parse_args(argv)  # type: ignore[no-untyped-call]
    with hidden_cuda() as hidden:

        def rank(module: str, arguments: Sequence[str]) -> None:
            hidden.close()
            _be_rank(module, arguments)

        config, _, _ = torchrun.config_from_args(arguments)
        launch = elastic_launch(replace(config, start_method="fork"), rank)
        try:
            launch(arguments.training_script, arguments.training_script_args)
        except ChildFailedError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _be_rank(module: str, arguments: Sequence[str]) -> None:
    """Run the program's module in this fork of the agent, as `python -m MODULE ARGUMENTS...` would.

    Returns if the program succeeds; otherwise ends the process with the program's exit code, or 1 for an exception.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [module, *arguments]
    code: Any = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    except SystemExit as end:
        code = end.code
    except BaseException:
        # multiprocessing would report the error to the agent only, and not write it to the rank's log.
        traceback.print_exc()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
