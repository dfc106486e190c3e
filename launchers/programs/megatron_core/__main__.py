"""Runs one rank of a trial: `torchrun ... -m launchers.programs.megatron_core SPEC.json FOLDER`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from launchers.programs.harness.cpu import enable_cpu
from launchers.programs.harness.measure import measured_enough
from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.rank import ACCOUNTED_STEPS, TimedSteps, end, run_rank
from launchers.programs.megatron_core.train import TrainingJob
from tuner.trial.contract import TrialSpec


def main(arguments: list[str]) -> int:
    """Run this rank's part of the trial; return the exit code.

    `arguments` are the path of the spec and the trial's folder.
    """
    return run_rank(arguments, run)


def run(spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
    """Build the model, warm up, time steps and report. Every rank makes the same calls."""
    with _process_group(spec) as device:
        steps = TimedSteps(spec, monitor, account)
        with account or nullcontext():
            monitor.enter("build")
            job = TrainingJob(spec.workload, spec.layout, spec.seed, device, enter=monitor.enter_part)
            monitor.enter("warmup")
            _step(job, steps)
            monitor.enter("memory")
            for _ in range(ACCOUNTED_STEPS - 1):
                _step(job, steps)
        monitor.enter("warmup")
        for _ in range(spec.measurement.warmup_steps - ACCOUNTED_STEPS):
            _step(job, steps)
        monitor.enter("measure")
        steps.report(_measured(job, steps))
        dist.barrier()
        job.close()


def _measured(job: TrainingJob, steps: TimedSteps) -> float | None:
    """Do steps until enough are timed and return None, or until the trial can be given up because it is too slow.

    In this case, return a lower bound of its step time in ms.
    """
    while not measured_enough(steps.measured_ms, steps.spec.measurement):
        if (above_ms := steps.slower_than_ms()) is not None:
            return above_ms
        _step(job, steps)
    return None


def _step(job: TrainingJob, steps: TimedSteps) -> None:
    steps.begin()
    local_loss, grad_norm = job.step()
    steps.stop(job.device)
    steps.keep(job.mean_loss(local_loss), grad_norm)


@contextmanager
def _process_group(spec: TrialSpec) -> Iterator[torch.device]:
    """Join the other ranks of the trial for the time of the context, and yield this rank's device.

    After an error the process group is not destroyed.

    Raises:
        ValueError: if the launcher started another number of ranks than the cluster has GPUs.
    """
    enable_cpu()
    on_cuda = spec.cluster.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    timeout = timedelta(seconds=max(spec.limits.startup_s, spec.limits.step_s))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout)
    if dist.get_world_size() != spec.cluster.world_size:
        raise ValueError(
            f"{dist.get_world_size()} ranks were started for a cluster of {spec.cluster.nodes} * "
            f"{spec.cluster.gpus_per_node} = {spec.cluster.world_size} GPUs"
        )
    yield device
    dist.destroy_process_group()


if __name__ == "__main__":
    end(main(sys.argv[1:]))
