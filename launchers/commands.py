"""Builds the command line and the environment of a trial's job, for every launcher in the same way."""

import math
import os
import sys
from collections.abc import Mapping

from launchers.processes import LOOPBACK, MARKER, python_path
from tuner.core.environment import allocator_environment, cuda_environment
from tuner.core.layout import KNOBS, data_parallel_size, num_microbatches
from tuner.errors import InputError, did_you_mean
from tuner.frameworks.megatron_bridge.override import bridge_words
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.frameworks.megatron_lm.trial_command import trial_words
from tuner.trial.contract import TrialFolder, TrialSpec
from tuner.trial.launcher import Place
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, fill

PROGRAMS: Mapping[str, str] = {"megatron_core": "launchers.programs.megatron_core"}
"""The Python module of each program that a spec may state by name."""

BRIDGE = "launchers.programs.megatron_bridge"
"""The module that runs a recipe of Megatron Bridge."""

COMMAND = "launchers.programs.command"
"""The module that runs a user's command, or a command line of Megatron-LM."""


def job_argv(
    spec: TrialSpec, folder: TrialFolder, torchrun: tuple[str, ...], programs: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the command line of a trial's job.

    Args:
        spec: The trial's spec.
        folder: The trial's folder.
        torchrun: The torchrun command that starts one rank per GPU, up to the program, which is appended.
        programs: The Python module of each program that the spec may state by name.

    Raises:
        InputError: if the spec states a program's name that `programs` lacks.
    """
    files = (str(folder.spec), str(folder.path))
    if isinstance(spec.program, Command):  # without torchrun: the command itself starts the ranks
        return (sys.executable, "-P", "-m", COMMAND, *files, *filled_command(spec, folder))
    if isinstance(spec.program, MegatronLm):
        steps = spec.measurement.warmup_steps + spec.measurement.max_steps
        words = trial_words(spec.program.megatron_lm, spec.layout, spec.workload, steps)
        # The measurement is read from the command's output, so the ranks must not write theirs to files.
        return (sys.executable, "-P", "-m", COMMAND, *files, *torchrun, "--redirects=0", *words)
    if isinstance(spec.program, BridgeRecipe):
        return (*torchrun, "-m", BRIDGE, *files)
    if spec.program not in programs:
        raise InputError(
            f"key 'program': unknown program '{spec.program}'{did_you_mean(spec.program, programs)}"
            f"; known: {', '.join(sorted(programs))}"
        )
    return (*torchrun, "-m", programs[spec.program], *files)


def filled_command(spec: TrialSpec, folder: TrialFolder) -> tuple[str, ...]:
    """Return the arguments of a spec's command, with values in place of placeholders such as `{tp}` or `{folder}`.

    Raises:
        TypeError: if the spec's program is not a `Command`.
    """
    if not isinstance(spec.program, Command):
        raise TypeError(f"program '{spec.program}' is no command")
    workload, cluster, layout = spec.workload, spec.cluster, spec.layout
    dp = data_parallel_size(cluster.world_size, layout.tp, layout.pp, layout.cp)
    values = {
        **{knob: str(getattr(layout, knob)) for knob in KNOBS},
        "spec": str(folder.spec),
        "folder": str(folder.path),
        "seed": str(spec.seed),
        "steps": str(spec.measurement.warmup_steps + spec.measurement.max_steps),
        "nodes": str(cluster.nodes),
        "gpus_per_node": str(cluster.gpus_per_node),
        "world_size": str(cluster.world_size),
        "dp": str(dp),
        "num_microbatches": str(num_microbatches(workload.global_batch_size, layout.micro_batch_size, dp)),
        "seq_length": str(workload.seq_length),
        "global_batch_size": str(workload.global_batch_size),
    }
    arguments = [word for flag, words in megatron_lm_arguments(layout).items() for word in (flag, *words)]
    return fill(spec.program.command, values, {"megatron_lm": arguments, "bridge": bridge_words(spec)})


def job_environment(
    spec: TrialSpec,
    folder: TrialFolder,
    place: Place,
    inherited: Mapping[str, str],
    *,
    cores: int,
    grace_s: float,
) -> dict[str, str]:
    """Return the environment variables that a trial's job gets in addition to those that it inherits.

    Args:
        spec: The trial's spec.
        folder: The trial's folder; its path is the value of MARKER, by which the job's processes are found.
        place: The GPUs on which the trial runs.
        inherited: The environment that the job inherits.
        cores: The number of CPU cores of a node that the ranks share.
        grace_s: The time between SIGTERM and SIGKILL for the ranks, in seconds.
    """
    cluster = spec.cluster
    on_cpu = cluster.device == "cpu"
    env = {
        MARKER: str(folder.path),
        "PYTHONPATH": os.pathsep.join(python_path()),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(max(1, cores // cluster.world_size) if on_cpu else 1),
        **LOOPBACK,
        # How long torchrun waits for its ranks after SIGTERM, in s. After a rank's failure it always waits 30 s.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_s)),
    }
    if not isinstance(spec.program, Command | MegatronLm):
        # No file in the trial's folder may pass for a module that a rank imports; a user's own command may rely on it.
        env["PYTHONSAFEPATH"] = "1"
    if on_cpu:  # A rank that saw a GPU would use it and take its memory.
        return env | {"CUDA_VISIBLE_DEVICES": ""}
    if place.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.gpus))
    cuda = cuda_environment(spec.layout, cluster, complete=isinstance(spec.program, BridgeRecipe))
    return env | cuda | allocator_environment(spec.layout, inherited)
