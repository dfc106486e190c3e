"""Runs one rank of a trial of any training program: reads its spec, times its steps, reports, and ends."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from launchers.programs.harness.failures import NonFiniteLossError, report_failure
from launchers.programs.harness.measure import slower_than_ms
from launchers.programs.harness.memory import GIB, TensorAccount, peak_gib
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.results import PeakGib, Steps, rank_record, write_completed, write_too_slow
from tuner.files import read_json
from tuner.trial.contract import RankRecord, TrialFolder, TrialSpec

ACCOUNTED_STEPS: Final = 2
"""Number of steps whose tensors are counted on CPU: the first creates Adam's state, so the second has the peak."""

Run = Callable[[TrialSpec, Monitor, TensorAccount | None], None]
"""Trains what the spec says, and reports. The account counts tensors on CPU; it is None on CUDA. Every rank makes the
same calls."""


def run_rank(arguments: list[str], run: Run) -> int:
    """Run this rank's part of the trial, and report a failure; return the exit code.

    `arguments` are the path of the spec and the trial's folder. `run` is the program's own part.
    """
    spec, folder = read_json(TrialSpec, Path(arguments[0])), TrialFolder(Path(arguments[1]))
    started_at = float(os.environ.get("MEGATUNE_STARTED_AT", time.time()))
    monitor = Monitor(folder, int(os.environ["RANK"]), started_at)
    on_cpu = spec.cluster.device == "cpu"
    account = TensorAccount(spec.cluster.gpu.memory_gib * GIB) if on_cpu else None
    try:
        run(spec, monitor, account)
    except Exception as error:
        report_failure(monitor, error, _peak_so_far(account))
        return 1
    return 0


def end(code: int) -> None:
    """Flush the output; if the exit code is not 0, end the process at once, even if something is still pending."""
    with suppress(OSError):  # the disk may be full
        sys.stdout.flush()
        sys.stderr.flush()
    if code:  # a collective may be pending for ever, and a normal exit would wait for it
        os._exit(code)


class TimedSteps:
    """The steps of a trial: times each one over all ranks, and checks its loss."""

    def __init__(self, spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
        self.spec, self.monitor, self.account = spec, monitor, account
        self.times_ms: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._started_s = 0.0

    def begin(self) -> None:
        """Begin a step on all ranks at the same time."""
        torch.cuda.synchronize()
        dist.barrier()
        self._started_s = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End a step and store the slowest rank's time, on every rank, so that all ranks decide the same."""
        torch.cuda.synchronize()
        elapsed = torch.tensor(time.perf_counter() - self._started_s, dtype=torch.float64, device=device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        self.times_ms.append(float(elapsed) * 1000)

    def keep(self, loss: float, grad_norm: float) -> None:
        """Count the step, and store its loss and gradient norm.

        Raises:
            NonFiniteLossError: on every rank, if the loss or the norm of the gradients is not finite.
        """
        self.monitor.finish_step()
        if not (isfinite(loss) and isfinite(grad_norm)):
            raise NonFiniteLossError(f"loss {loss}, gradient norm {grad_norm} in step {self.monitor.step}")
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    @property
    def measured_ms(self) -> list[float]:
        """Return the times of the steps after the first `warmup_steps` steps, in ms."""
        return self.times_ms[self.spec.measurement.warmup_steps :]

    def slower_than_ms(self) -> float | None:
        """Return a lower bound of the trial's step time in ms if it exceeds what the spec allows, otherwise None."""
        return slower_than_ms(self.measured_ms, self.spec)

    def report(self, above_ms: float | None) -> None:
        """Collect the records of all ranks, and write the trial's result on rank 0; every rank must call it.

        `above_ms` is the lower bound of the step time in ms for which the trial was given up; None if the trial
        completed.
        """
        self.monitor.enter("teardown")
        record = rank_record(self.monitor, peak_gib(self.account))
        records: list[RankRecord] = [record] * dist.get_world_size()
        dist.all_gather_object(records, record)
        if self.monitor.rank:
            return
        if above_ms is None:
            steps = Steps(tuple(self.times_ms), tuple(self.losses), tuple(self.grad_norms))
            write_completed(self.spec, self.monitor, steps, records)
        else:
            write_too_slow(self.spec, self.monitor, above_ms, records)


def _peak_so_far(account: TensorAccount | None) -> PeakGib:
    """Return the peak of allocated and of reserved memory before a failure, in GiB.

    Both are None if the rank had not initialised its device yet.
    """
    has_device = account is not None or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return peak_gib(account) if has_device else (None, None)
