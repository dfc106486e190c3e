"""What every launcher shares: the plan of a trial's job, its time limits, and who owns its processes."""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

import launchers
from tuner.trial.contract import Heartbeat, Limits, Phase, TrialFolder, TrialResult, TrialSpec

MARKER = "MEGATUNE_TRIAL"
"""The environment variable by which a trial's processes are known wherever they moved: its folder."""

STARTED_AT = "MEGATUNE_STARTED_AT"
"""The environment variable that tells a program when its launcher began, in seconds since the epoch."""

Ending = Literal["stop", "startup", "step", "trial"]
"""Why a launcher ended a job itself: it was told to, or the limit of that name was passed."""

_FOREIGN_VARIABLES = ("TORCHELASTIC_", "PET_")
"""Prefixes of what another torchrun around us would pass to ours."""

SILENT_STEPS = 20
"""How many times its slowest step so far a job may be silent."""
LEAST_SILENCE_S = 30.0
"""What a job may always be silent, however quick its steps: a checkpoint, a collection, a late compilation."""
_STEPS_TO_JUDGE = 3
"""How many steps after the first must be seen before their times say how long silence may last."""

_KILL_S = 10.0
"""How long the kernel gets to take away a killed process; one that stays longer hangs in a driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything a launcher will do for one trial, decided before it touches anything."""

    folder: Path
    """The trial's folder, absolute; the job's working directory."""
    world_size: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """What is set on top of the inherited environment."""
    files: Mapping[str, str]
    """What is written before the start: path within the folder to content."""
    limits: Limits
    gpus: int = 0
    """GPUs of this machine that the job uses, the first it sees; 0 on CPU."""

    def shell_command(self) -> str:
        """One line for a POSIX shell that runs the trial again, without the tuner."""
        variables = [f"{name}={value}" for name, value in self.env.items()]
        return f"cd {shlex.quote(str(self.folder))} && {shlex.join(['env', *variables, *self.argv])}"

    def to_data(self) -> dict[str, Any]:
        """The plan as JSON data, as plan.json keeps it; of the files the names, since they lie beside it."""
        return {
            "command": self.shell_command(),
            "argv": list(self.argv),
            "env": dict(self.env),
            "world_size": self.world_size,
            "files": list(self.files),
            "limits": {
                "startup_s": self.limits.startup_s,
                "step_s": self.limits.step_s,
                "trial_s": self.limits.trial_s,
            },
        }


class Launcher(Protocol):
    """Runs trials, one at a time."""

    def plan(self, spec: TrialSpec, folder: TrialFolder) -> LaunchPlan:
        """Decide what to run, touching nothing.

        Raises:
            InputError: if this launcher cannot run the spec.
        """

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """Run the job to its end, whatever that is, and leave the result in the trial's folder.

        Blocks. When `stop` is set, ends the job; the outcome is interrupted. No process of the job outlives
        the call.
        """


@dataclass(slots=True)
class Clock:
    """Tells when a trial passes one of its limits, from the heartbeats seen. Times are monotonic seconds."""

    limits: Limits
    started_s: float
    heartbeat: Heartbeat | None = None
    _beat_s: float = field(default=0.0, init=False)
    _warm: tuple[int, float] | None = field(default=None, init=False)
    """The first step that was seen finished, and when."""
    _stepped_s: float = field(default=0.0, init=False)
    """When a step was last seen finished."""
    _slowest_s: float = field(default=0.0, init=False)
    """The longest time between two such moments: no step after the first took longer."""

    def beat(self, heartbeat: Heartbeat, now_s: float) -> bool:
        """Take a heartbeat in; return whether it is a new one.

        Its age counts from when it was seen: the clocks of two nodes need not agree.
        """
        if heartbeat == self.heartbeat:
            return False
        step = self.heartbeat.step if self.heartbeat else 0
        self.heartbeat, self._beat_s = heartbeat, now_s
        if heartbeat.step > step:
            if self._warm is None:
                self._warm = heartbeat.step, now_s
            else:
                self._slowest_s = max(self._slowest_s, now_s - self._stepped_s)
            self._stepped_s = now_s
        return True

    @property
    def phase(self) -> Phase:
        """Where the trial was last seen."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def silence_s(self) -> float:
        """How long the job may be silent after its first step: less than the limit once its steps are known."""
        if self._warm is None or self.heartbeat is None:
            return self.limits.step_s
        if self.heartbeat.step - self._warm[0] < _STEPS_TO_JUDGE:
            return self.limits.step_s
        return min(self.limits.step_s, max(LEAST_SILENCE_S, SILENT_STEPS * self._slowest_s))

    def slower_than_ms(self, now_s: float) -> float | None:
        """A lower bound of the mean step time: the steps since the first, and the one under way, took no less."""
        if self._warm is None or self.heartbeat is None:
            return None
        step, since_s = self._warm
        return max(now_s - since_s, 0.0) / (self.heartbeat.step - step + 1) * 1000 or None

    def passed(self, now_s: float) -> Ending | None:
        """The limit that is passed, if any."""
        if now_s - self.started_s > self.limits.trial_s:
            return "trial"
        if self.heartbeat is None or self.heartbeat.step < 1:
            return "startup" if now_s - self.started_s > self.limits.startup_s else None
        return "step" if now_s - self._beat_s > self.silence_s else None


def python_path() -> list[str]:
    """Where the children find our packages when they run from a checkout; the user's own entries stay."""
    root = Path(launchers.__file__).parents[1]
    # An installed package is found without help, and site-packages in front would hide the standard library.
    ours = [] if root.name in {"site-packages", "dist-packages"} else [str(root)]
    theirs = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return [*ours, *(str(Path(entry).absolute()) for entry in theirs)]


def inherited_environment() -> dict[str, str]:
    """Our own environment as a job inherits it, without what belongs to another torchrun."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_VARIABLES)}


def _processes(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # Other users' processes cannot be read, and any process may end while it is looked at.
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and belongs(process) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def marked_processes(folder: str) -> list[psutil.Process]:
    """The living processes of this machine whose marker is `folder`, a trial's, or lies below it."""
    return _processes(lambda process: _is_marked(process, folder))


def _is_marked(process: psutil.Process, folder: str) -> bool:
    marker = process.environ().get(MARKER)
    return marker is not None and Path(marker).is_relative_to(folder)


class RunningJob(Protocol):
    """The processes of one trial on this machine, the whole tree of them."""

    def ended(self) -> bool:
        """Whether the first process has ended."""

    def end(self, grace_s: float) -> tuple[int, ...]:
        """End every process: SIGTERM, and SIGKILL after `grace_s`; may be called again.

        Returns:
            The process ids that even SIGKILL did not end; empty but for a process that hangs in a driver.
        """

    @property
    def exit_code(self) -> int | None:
        """The first process's exit code, negative for a signal; None before `end`."""


class Job:
    """A job started cold.

    They are known as descendants, as members of the process group, and by the marker, which also finds those
    that changed their session after their parent died.
    """

    def __init__(self, argv: tuple[str, ...], env: Mapping[str, str], folder: Path, output: Path) -> None:
        """Start `argv` in `folder`, in its own session, its output appended to `output`; raises OSError."""
        self._marker = env[MARKER]
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                argv,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether the first process has ended. It stays unreaped, so that its id stays its own."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, grace_s: float) -> tuple[int, ...]:
        """See RunningJob; the first process is reaped."""
        left = end_processes(self._alive, grace_s)
        if self.ended():
            self._process.wait()
        return tuple(process.pid for process in left)

    @property
    def exit_code(self) -> int | None:
        """See RunningJob."""
        return self._process.returncode

    def _alive(self) -> list[psutil.Process]:
        root = self._process.pid
        if self._process.returncode is not None:
            return marked_processes(self._marker)
        descendants: set[psutil.Process] = set()
        with suppress(psutil.Error):
            descendants.update(psutil.Process(root).children(recursive=True))
        return _processes(
            lambda process: (
                process in descendants or os.getpgid(process.pid) == root or _is_marked(process, self._marker)
            )
        )


def end_marked(folder: str, grace_s: float) -> tuple[int, ...]:
    """End what a killed launcher has left running for a trial, or for any trial of a sweep, by its folder.

    Returns:
        The process ids that even SIGKILL did not end.
    """
    return tuple(process.pid for process in end_processes(lambda: marked_processes(folder), grace_s))


def end_processes(find: Callable[[], list[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """End what `find` finds, until it finds nothing: SIGTERM, and SIGKILL after `grace_s`; return what is left."""
    alive = find()
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_S)):
        deadline_s = time.monotonic() + patience_s
        told: set[psutil.Process] = set()
        # Looked up anew each time: a process may be started while the others are ended.
        while alive and time.monotonic() < deadline_s:
            for process in set(alive) - told:
                with suppress(psutil.Error):
                    process.send_signal(number)
            told.update(alive)
            time.sleep(0.05)
            alive = find()
    return alive
