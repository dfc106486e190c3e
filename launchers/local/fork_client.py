"""Starts jobs as forks of a process that has already imported the jobs' program, so that no job imports it again."""

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from launchers.processes import MARKER, STARTED_AT, TORCHRUN, ColdJob, RunningJob, end_processes, is_running

if TYPE_CHECKING:  # importing it would import torch into the tuner
    from launchers.local.fork_server import ForkAnswer, ForkRequest

_log = logging.getLogger(__name__)

IMPORTED: Mapping[str, str] = {
    "launchers.programs.megatron_core": "launchers.programs.megatron_core.__main__",
    "launchers.programs.megatron_bridge": "launchers.programs.megatron_bridge.ahead",
}
"""The module that a server imports before it forks, by the module of the jobs' program. For any other program a server
imports torch only, since importing the program itself may run it."""

_TORCH = "torch._dynamo"
"""A module that imports all of torch. Without it, each failing rank would import this module to log its error, which
takes seconds."""

_READ_LATE = (MARKER, STARTED_AT, "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_")
"""Prefixes of environment variables that are read only after the imports, so that they may be set in a fork."""
_END_S = 10.0
"""How long a server may take to report that its job has ended, in seconds. Assumed."""


class Preload:
    """Starts jobs as forks of servers. A server is a process that has imported a program and runs one job at a time.

    A server imports the program for its first job, and also runs later jobs with the same program and environment.
    There are never more servers than the most jobs that have run at once so far. `start` may be called from several
    threads. Use a Preload as a context manager: its exit ends the servers and their jobs.

    Args:
        marker: The sweep's folder. Its path is the value of MARKER in the servers' environment, by which they are found
            if the tuner dies.
    """

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker.absolute())
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        self._most_jobs = 0
        """The largest number of jobs that have run at once so far."""
        self._unforkable: set[str] = set()
        """The programs' modules whose import used CUDA, so that their jobs cannot be forked and start as `ColdJob`s."""

    def __enter__(self) -> "Preload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for server in self._servers:
                server.close()

    def jobs(self) -> list[psutil.Process]:
        """Return the running processes of all jobs that are forks of servers."""
        with self._lock:
            return [process for server in self._servers for process in server.jobs()]

    def start(self, argv: tuple[str, ...], env: Mapping[str, str], folder: Path, output: Path) -> RunningJob:
        """Start a torchrun command as a fork of a server, and any other command as a new process (`ColdJob`).

        The arguments are those of `launchers.processes.ColdJob`.

        Raises:
            OSError: if the server or the command cannot be started.
        """
        if argv[1 : 1 + len(TORCHRUN)] != TORCHRUN:
            return ColdJob(argv, env, folder, output)
        module = argv[argv.index("-m", 1 + len(TORCHRUN)) + 1]
        if module in self._unforkable:
            return ColdJob(argv, env, folder, output)
        early = {name: value for name, value in env.items() if not name.startswith(_READ_LATE)}
        with self._lock:
            server = self._idle_server(module, early, output)
            server.is_busy = True
        arguments = argv[1 + len(TORCHRUN) :]

        def start_cold() -> ColdJob:
            if module not in self._unforkable:
                _log.warning(
                    "%s uses CUDA while it is imported, so trials cannot be forked from a loaded process: each starts "
                    "anew, which takes seconds longer",
                    module,
                )
            self._unforkable.add(module)
            return ColdJob(argv, env, folder, output)

        request: ForkRequest = {
            "argv": [*arguments],
            "env": dict(env),
            "folder": str(folder),
            "output": str(output),
        }
        return ForkedJob(server, request, start_cold)

    def _idle_server(self, module: str, env: dict[str, str], output: Path) -> "_Server":
        """Return an idle server that has imported `module` in this environment, or else a new server.

        A new server writes its own output to `output`. Before it starts, idle servers are ended that have died, or that
        would be more than the most jobs that have run at once.
        """
        idle = [server for server in self._servers if not server.is_busy]
        self._most_jobs = max(self._most_jobs, len(self._servers) - len(idle) + 1)
        for server in idle:
            if server.is_alive() and server.key == (module, env):
                return server
        for server in idle:
            if not server.is_alive() or len(self._servers) >= self._most_jobs:
                server.close()
                self._servers.remove(server)
        server = _Server(module, env, self._marker, output)
        self._servers.append(server)
        return server


class _Server:
    """A process that has imported a program and runs one job at a time (`fork_server`), with the pipes to it."""

    def __init__(self, module: str, env: dict[str, str], marker: str, output: Path) -> None:
        self.key = (module, env)
        """The module of the jobs' program, and the environment in which the server imported it."""
        self.is_busy = False
        """Whether the server has a job: set by `Preload.start`, cleared when the job has ended."""
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launchers.local.fork_server", IMPORTED.get(module, _TORCH)],
                # Otherwise torch asks CUDA's driver how many devices there are, and a fork could not use them.
                env={**env, MARKER: marker, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self.answers: Queue[ForkAnswer | None] = Queue()
        """The answers that the server has written and nobody has read yet; None follows the last one."""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: "ForkRequest") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def jobs(self) -> list[psutil.Process]:
        """Return the running descendants of the server, which are the processes of its job."""
        try:
            descendants = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [process for process in descendants if is_running(process)]

    def close(self) -> None:
        """Kill the server and its job; may be called again."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGSTOP)  # so that it forks no further job
        end_processes(self.jobs, grace_s=0.0)
        self.process.kill()
        self.process.wait()
        self._listener.join(_END_S)
        self.process.stdin.close()
        self.process.stdout.close()


class ForkedJob:
    """A job that runs as a fork of a server; if the server reports that it cannot fork, `start_cold` starts the job."""

    def __init__(self, server: _Server, request: "ForkRequest", start_cold: Callable[[], ColdJob]) -> None:
        self._server, self._start_cold = server, start_cold
        self._cold: ColdJob | None = None
        self._started = self._ended = False
        self._survivors: tuple[int, ...] | None = None
        """What `end` returned; None before `end` was called."""
        self._exit_code: int | None = None
        with suppress(BrokenPipeError):  # the server has died; its last answer, None, reports that
            server.ask(request)

    def ended(self) -> bool:
        """See RunningJob: return whether torchrun's agent has ended, or the server has ended before it forked one."""
        while not self._ended:
            try:
                self._take(self._server.answers.get_nowait())
            except Empty:
                break
        return self._cold.ended() if self._cold else self._ended

    @property
    def exit_code(self) -> int | None:
        """See RunningJob: the exit code of torchrun's agent, or of the server if that died; None while the job runs."""
        return self._cold.exit_code if self._cold else self._exit_code

    def end(self, grace_s: float) -> tuple[int, ...]:
        """See RunningJob: end all processes of the job.

        A second call only returns the first one's result, since the server may run another job by then.
        """
        if self._survivors is not None:
            return self._survivors
        self.ended()
        if not self._started and not self._ended:
            self._server.close()
        survivors = end_processes(self._server.jobs, grace_s) if self._cold is None else []
        with suppress(Empty):
            while not self._ended:
                self._take(self._server.answers.get(timeout=_END_S))
        if not self._ended:  # a late answer would be taken for one about the server's next job
            self._server.close()
        self._survivors = tuple(process.pid for process in survivors)
        if self._cold is None:
            self._server.is_busy = False
        else:
            self._survivors += self._cold.end(grace_s)
        return self._survivors

    def _take(self, answer: "ForkAnswer | None") -> None:
        if answer is None:
            self._ended, self._exit_code = True, self._server.process.wait()
        elif answer["event"] == "cannot fork":
            self._ended, self._cold = True, self._start_cold()
            self._server.is_busy = False
        elif answer["event"] == "started":
            self._started = True
        elif answer["event"] == "ended":
            self._ended, self._exit_code = True, answer["value"]
