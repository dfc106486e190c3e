"""Run one rank of a trial: `torchrun ... -m launchers.programs.megatron_core SPEC.json FOLDER`."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist

from launchers.programs.megatron_core.cpu import enable_cpu
from launchers.programs.megatron_core.measure import lower_bound_ms, measured_enough
from launchers.programs.megatron_core.memory import GIB, TensorAccount, peak_gib
from launchers.programs.megatron_core.report import (
    Monitor,
    NonFiniteLossError,
    Steps,
    rank_record,
    report_failure,
    write_completed,
    write_too_slow,
)
from launchers.programs.megatron_core.train import Job
from tuner.files import read_json
from tuner.trial import RankRecord, TrialFolder, TrialSpec

ACCOUNTED_STEPS = 2
"""On CPU: Adam's state comes with the first step, so the second holds the peak."""


def main(arguments: list[str]) -> int:
    """Run the trial of this rank; returns the exit code."""
    spec, folder = read_json(TrialSpec, Path(arguments[0])), TrialFolder(Path(arguments[1]))
    started_at = float(os.environ.get("MEGATUNE_STARTED_AT", time.time()))
    monitor = Monitor(folder, int(os.environ["RANK"]), started_at)
    account = None
    if spec.cluster.device == "cpu":
        account = TensorAccount(spec.cluster.gpu.memory_gib * GIB)
    try:
        run(spec, monitor, account)
    except Exception as error:
        report_failure(monitor, error, _peak_so_far(account))
        return 1
    return 0


def run(spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
    """Build, warm up, measure and report. Every rank makes the same calls."""
    with _process_group(spec) as device:
        with account or nullcontext():
            monitor.enter("build")
            job = Job(spec.workload, spec.layout, spec.seed, device, monitor.enter_part)
            trial = _Trial(spec, monitor, job)
            monitor.enter("warmup")
            trial.step()
            monitor.enter("memory")
            for _ in range(ACCOUNTED_STEPS - 1):
                trial.step()
        monitor.enter("warmup")
        for _ in range(spec.measurement.warmup_steps - ACCOUNTED_STEPS):
            trial.step()
        monitor.enter("measure")
        slower_than_ms = trial.measure()
        monitor.enter("teardown")
        records: list[RankRecord] = [rank_record(monitor, peak_gib(account))] * dist.get_world_size()
        dist.all_gather_object(records, records[0])
        if monitor.rank == 0:
            if slower_than_ms is None:
                steps = Steps(tuple(trial.times_ms), tuple(trial.losses), tuple(trial.grad_norms))
                write_completed(spec, monitor, steps, records)
            else:
                write_too_slow(spec, monitor, slower_than_ms, records)
        dist.barrier()
        job.close()


class _Trial:
    """The steps of a trial: each timed over all ranks and its loss checked."""

    def __init__(self, spec: TrialSpec, monitor: Monitor, job: Job) -> None:
        self.measurement, self.give_up_above_ms = spec.measurement, spec.give_up_above_ms
        self.monitor, self.job = monitor, job
        self.times_ms: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def measure(self) -> float | None:
        """Do steps until enough are timed; return what the step time is above where that rules the trial out.

        Every rank decides by the same times.
        """
        least, limit_ms = self.measurement.warmup_steps, self.give_up_above_ms
        while not measured_enough(times_ms := self.times_ms[least:], self.measurement):
            if limit_ms is not None:
                bound_ms = lower_bound_ms(times_ms, self.measurement)
                if bound_ms is not None and bound_ms > limit_ms:
                    return bound_ms
            self.step()
        return None

    def step(self) -> None:
        """Do one step, and keep the slowest rank's time, which every rank then knows.

        Raises:
            NonFiniteLossError: on every rank, if the loss or the norm of the gradients is not finite.
        """
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        local_loss, grad_norm = self.job.step()
        torch.cuda.synchronize()
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.job.device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        loss = self.job.mean_loss(local_loss)
        self.monitor.finish_step()
        if not (isfinite(loss) and isfinite(grad_norm)):
            raise NonFiniteLossError(f"loss {loss}, gradient norm {grad_norm} in step {self.monitor.step}")
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.times_ms.append(float(elapsed) * 1000)


@contextmanager
def _process_group(spec: TrialSpec) -> Iterator[torch.device]:
    """Take this rank's device and join the ranks; leaves them at the end of a run without an error.

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


def _peak_so_far(account: TensorAccount | None) -> tuple[float | None, float | None]:
    """The peak up to a failure; nothing where not even the device was reached."""
    reached = account is not None or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return peak_gib(account) if reached else (None, None)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):  # the disk may be full
        sys.stdout.flush()
        sys.stderr.flush()
    if code:  # a collective may be pending for ever, and its destructor would wait for it
        os._exit(code)
