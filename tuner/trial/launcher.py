"""What the tuner asks of a launcher: a plan that can be printed, and a run that ends in a result."""

import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tuner.trial.contract import Heartbeat, Limits, TrialFolder, TrialResult, TrialSpec


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trial runs. Trials in different places do not share GPUs."""

    gpus: tuple[int, ...] = ()
    """GPUs of this machine, by their index; empty for all that the launcher sees."""


WHOLE_MACHINE: Final = Place()


class Launcher(Protocol):
    """Runs trials; `run` may be called from several threads at once, for different trials."""

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """Decide what to run and where, touching nothing.

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
