"""The interface of a launcher, which makes a printable plan for a trial's job, and runs the plan to get a result."""

import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tuner.trial.contract import Heartbeat, Limits, TrialFolder, TrialResult, TrialSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything that a launcher will do for one trial, decided before the launcher changes anything."""

    folder: Path
    """The trial's folder as an absolute path; it is the job's working directory."""
    world_size: int
    """The number of ranks."""
    argv: tuple[str, ...]
    """The command line that starts the job on this machine."""
    env: Mapping[str, str]
    """Environment variables that the job gets in addition to the inherited ones."""
    files: Mapping[str, str]
    """The files to write before the job starts, as contents by path within the trial's folder."""
    limits: Limits
    gpus: int = 0
    """The number of GPUs of this machine that the job uses, the first of those visible to it; 0 for a job on CPU."""

    def shell_command(self) -> str:
        """Return one line of POSIX shell that runs the trial's job again without the tuner."""
        variables = [f"{name}={value}" for name, value in self.env.items()]
        return f"cd {shlex.quote(str(self.folder))} && {shlex.join(['env', *variables, *self.argv])}"

    def to_data(self) -> dict[str, Any]:
        """Return the plan as JSON data for plan.json; its files are only listed by name, since they lie beside it."""
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
    """The indices of this machine's GPUs that the trial uses; empty means all GPUs visible to the launcher."""


WHOLE_MACHINE: Final = Place()
"""The place of a trial that has the whole machine to itself."""


class Launcher(Protocol):
    """The interface of a launcher. Several threads may call `run` at once, for different trials."""

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """Return the plan of a trial's job, without changing anything on disk.

        Args:
            spec: the trial's spec.
            folder: the trial's folder.
            place: the GPUs on which the trial runs.

        Raises:
            InputError: if this launcher cannot run the spec.
        """

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """Run a planned job to its end, write the trial's result into its folder, and return the result.

        The call blocks until all processes of the job have ended.

        Args:
            plan: the plan, as returned by the method `plan`.
            stop: once it is set, the launcher ends the job, and the outcome is interrupted.
            on_heartbeat: called with each heartbeat of the job.
        """
