"""Forks torchrun jobs from a process that imported their program once: `python -m launchers.local.fork_server MODULE`.

Importing torch and Megatron takes longer than most trials. Requests come as lines of JSON on the standard input,
each the torchrun command of a job; answers go as lines to what was the standard output. The server runs one job at a
time. The job is torchrun's own agent, run with the same arguments in a fork, and its ranks are forks of the agent:
they have their own processes, process group, device context and output, as the ranks of a cold job have.

CUDA cannot be used in a fork of a process that has used it. So the server checks after its imports whether one of them
has used CUDA, and then runs no job; and the agent is told that there is no CUDA, since torchrun itself may ask.

When the input ends, the client is gone, and the server ends its job and itself. While it imports, which takes many
seconds on a busy machine, it cannot look at its input; during that time it dies with the thread that started it.
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
    """One job to start."""

    argv: list[str]
    """The arguments of torchrun, without its own name."""
    env: dict[str, str]
    """All environment variables of the job."""
    folder: str
    """The working directory."""
    output: str
    """The file that the agent's output is appended to."""


class ForkAnswer(TypedDict):
    """What the server reports: its module is imported, or makes forks useless; a job has started, or has ended."""

    event: Literal["ready", "cannot fork", "started", "ended"]
    value: int
    """Process id of the server or of the agent, or the agent's exit code (negative for a signal)."""


def main(module: str) -> int:
    """Import `module`, the expensive part of the jobs' program, then serve requests until the input ends; return 0."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    # Neither the jobs nor a chatty import may write into the answers.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    adopt_orphans()
    _die_with_parent(signal.SIGKILL)
    if _has_ended(requests.fileno()):  # the client died before the line above
        return 0
    importlib.import_module("launchers.local.agent")
    importlib.import_module(module)
    _die_with_parent(0)  # from here on its jobs must be ended with it
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
        code = wait_for_end(pid, requests.fileno())  # nothing is asked for while a job runs
        if code is None:
            break
        _answer(answers, {"event": "ended", "value": code})
    end_descendants()
    return 0


def _die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it dies; 0 for none."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _has_ended(requests: int) -> bool:
    poll = select.poll()
    poll.register(requests, 0)  # a hang-up is reported without being asked for
    return bool(poll.poll(0))


def _answer(answers: int, answer: ForkAnswer) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


def _become_job(request: ForkRequest) -> NoReturn:
    """Turn this fork into torchrun's agent; never return."""
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
    # `main` has already imported these modules. A mere import of this file must not import them.
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
    """Run the program in a fork of the agent, as `python -m MODULE ARGUMENTS...` would."""
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
        # multiprocessing would tell only the agent, and the rank's own log would stay empty.
        traceback.print_exc()
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
