"""The interface of a launcher: it makes a plan that can be printed, and runs it until there is a result."""

import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tuner.trial.contract import Heartbeat, Limits, TrialFolder, TrialResult, TrialSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything that a launcher will do for one trial, decided before it changes anything."""

    folder: Path
    """The trial's folder as an absolute path; it is the job's working directory."""
    world_size: int
    """Number of ranks."""
    argv: tuple[str, ...]
    """The words of the command that starts the job on this machine."""
    env: Mapping[str, str]
    """Variables that are set on top of the inherited environment."""
    files: Mapping[str, str]
    """Files that are written before the start: content by path within the folder."""
    limits: Limits
    gpus: int = 0
    """Number of GPUs of this machine that the job uses, the first ones that it sees; 0 on CPU."""

    def shell_command(self) -> str:
        """Return one line for a POSIX shell that runs the trial again without the tuner."""
        variables = [f"{name}={value}" for name, value in self.env.items()]
        return f"cd {shlex.quote(str(self.folder))} && {shlex.join(['env', *variables, *self.argv])}"

    def to_data(self) -> dict[str, Any]:
        """Return the plan as JSON data for plan.json: files without their content, since they lie beside it."""
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


@dataclass(frozen=True, slots=True)
class Place:
    """The part of the machine on which a trial runs. Trials in different places do not share GPUs."""

    gpus: tuple[int, ...] = ()
    """Indices of this machine's GPUs that the trial uses; empty means all that the launcher sees."""


WHOLE_MACHINE: Final = Place()
"""The place of a trial that shares the machine with no other."""


class Launcher(Protocol):
    """Runs trials; `run` may be called from several threads at once, for different trials."""

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """Return what to run and where, without changing anything.

        Raises:
            InputError: if this launcher cannot run the spec.
        """

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """Run the job until it ends in any outcome, write the result into the trial's folder, and return it.

        The call blocks. No process of the job outlives it.

        Args:
            plan: what to run.
            stop: once it is set, the launcher ends the job, and the outcome is interrupted.
            on_heartbeat: is called with each heartbeat of the job.
        """
