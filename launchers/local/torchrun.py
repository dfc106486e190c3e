"""The launcher that runs trials on this machine, under torchrun."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launchers.commands import PROGRAMS, job_argv, job_environment
from launchers.engine import Engine, OnHeartbeat, Start
from launchers.processes import ColdJob, inherited_environment, loopback_torchrun
from tuner.errors import InputError
from tuner.files import to_data
from tuner.frameworks.megatron_bridge.recipe_file import with_file_text
from tuner.trial.contract import TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import WHOLE_MACHINE, LaunchPlan, Place
from tuner.trial.program import BridgeRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchrunLauncher:
    """The launcher that runs each trial as one torchrun job on this machine. Several threads may call `run` at once."""

    programs: Mapping[str, str] = field(default_factory=lambda: PROGRAMS)
    """The Python module of each program that a spec may state by name."""
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """The number of CPU cores that the ranks of a trial share."""
    grace_s: float = 10.0
    """The time between SIGTERM and SIGKILL, in seconds. Assumed: enough for a rank to record its failure."""
    start: Start = ColdJob
    """Starts a job as a new process; `Preload.start` instead starts it as a fork."""

    def plan(self, spec: TrialSpec, folder: TrialFolder, place: Place = WHOLE_MACHINE) -> LaunchPlan:
        """Return the launch plan of a trial's job, without starting anything; see Launcher.

        The plan states no port: the kernel chooses one when the job starts, so that no two jobs use the same.

        Raises:
            InputError: if the cluster has more than one node, or the spec's program is not known.
        """
        cluster = spec.cluster
        if cluster.nodes > 1:
            raise InputError(
                f"cluster '{cluster.name}': nodes = {cluster.nodes}, but the torchrun launcher starts jobs "
                "on this machine only: set cluster.nodes to 1; `megatune plan` and `explain` work for any cluster"
            )
        folder = TrialFolder(folder.path.absolute())
        if isinstance(spec.program, BridgeRecipe):
            spec = replace(spec, program=with_file_text(spec.program))
        torchrun = loopback_torchrun(cluster.world_size, "trial", folder.log)
        return LaunchPlan(
            folder=folder.path,
            world_size=cluster.world_size,
            argv=job_argv(spec, folder, torchrun, self.programs),
            env=job_environment(
                spec, folder, place, inherited_environment(), cores=self.cores, grace_s=self.grace_s
            ),
            files={folder.spec.name: json.dumps(to_data(spec), indent=2) + "\n"},
            limits=spec.limits,
            gpus=cluster.world_size if cluster.device == "cuda" else 0,
        )

    def run(
        self, plan: LaunchPlan, stop: threading.Event, on_heartbeat: OnHeartbeat | None = None
    ) -> TrialResult:
        """Run a planned job to its end and return the trial's result; see Launcher."""
        engine = Engine(start=self.start, grace_s=self.grace_s, cores=self.cores)
        return engine.run(plan, stop, on_heartbeat)
