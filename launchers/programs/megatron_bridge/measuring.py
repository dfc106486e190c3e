"""What measures while Bridge trains: a callback that is called before and after each of its steps."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from math import isfinite, nan
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from launchers.programs.megatron_core.measure import lower_bound_ms, measured_enough
from launchers.programs.megatron_core.memory import TensorAccount, peak_gib
from launchers.programs.megatron_core.report import (
    Monitor,
    NonFiniteLossError,
    Steps,
    rank_record,
    write_completed,
    write_too_slow,
)
from tuner.trial import RankRecord, TrialSpec

ACCOUNTED_STEPS = 2
"""On CPU: Adam's state comes with the first step, so the second holds the peak."""

_LOSS = "lm loss"
"""What Bridge calls the mean loss a token."""


class Measuring(Callback):  # type: ignore[misc]
    """Times every step over all ranks, checks its loss, and ends the training once enough is known.

    Args:
        account: What accounts the tensors on CPU; it is entered here, since it must end within the training.
    """

    def __init__(self, spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
        self.spec, self.monitor, self.account = spec, monitor, account
        self.accounting = ExitStack()
        if account is not None:
            self.accounting.enter_context(account)
        self.times_ms: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.slower_than_ms: float | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """The model stands."""
        optimizer: Any = context.optimizer
        optimizer.step = _announced(optimizer.step, lambda: self.monitor.enter_part("optimizer"))
        self.monitor.enter("warmup")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """All ranks begin at once."""
        torch.cuda.synchronize()
        dist.barrier()
        self._start = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Keep the slowest rank's time, which every rank then knows, so that all decide the same.

        Raises:
            NonFiniteLossError: on every rank, if the loss or the norm of the gradients is not finite.
        """
        torch.cuda.synchronize()
        device = torch.cuda.current_device()
        elapsed = torch.tensor(time.perf_counter() - self._start, dtype=torch.float64, device=device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        loss, grad_norm = _shared_loss(context, device), float(context.grad_norm or 0.0)
        self.monitor.finish_step()
        if not (isfinite(loss) and isfinite(grad_norm)):
            raise NonFiniteLossError(f"loss {loss}, gradient norm {grad_norm} in step {self.monitor.step}")
        self.times_ms.append(float(elapsed) * 1000)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self._enter_phase()
        if self._knows_enough():
            context.state.cfg.train.train_iters = context.state.train_state.step + 1

    def on_train_end(self, context: CallbackContext) -> None:
        """Report, while the ranks are still together."""
        self.monitor.enter("teardown")
        records: list[RankRecord] = [
            rank_record(self.monitor, peak_gib(self.account))
        ] * dist.get_world_size()
        dist.all_gather_object(records, records[0])
        if self.monitor.rank:
            return
        if self.slower_than_ms is None:
            steps = Steps(tuple(self.times_ms), tuple(self.losses), tuple(self.grad_norms))
            write_completed(self.spec, self.monitor, steps, records)
        else:
            write_too_slow(self.spec, self.monitor, self.slower_than_ms, records)

    def _enter_phase(self) -> None:
        done = len(self.times_ms)
        if done == 1:
            self.monitor.enter("memory")
        if done == ACCOUNTED_STEPS:
            self.accounting.close()
            self.monitor.enter("warmup")
        if done == self.spec.measurement.warmup_steps:
            self.monitor.enter("measure")

    def _knows_enough(self) -> bool:
        measurement, limit_ms = self.spec.measurement, self.spec.give_up_above_ms
        timed_ms = self.times_ms[measurement.warmup_steps :]
        if measured_enough(timed_ms, measurement):
            return True
        if limit_ms is None or not timed_ms:
            return False
        bound_ms = lower_bound_ms(timed_ms, measurement)
        if bound_ms is not None and bound_ms > limit_ms:
            self.slower_than_ms = bound_ms
        return self.slower_than_ms is not None


def _shared_loss(context: CallbackContext, device: Any) -> float:
    """The step's loss, which only the last pipeline stage has, on every rank; NaN where none has it."""
    own = (context.loss_dict or {}).get(_LOSS)
    known = torch.zeros(2, dtype=torch.float64, device=device)
    if own is not None:
        known[0], known[1] = float(own), 1.0
    dist.all_reduce(known)
    total, ranks = known.tolist()
    return total / ranks if ranks else nan


def _announced(step: Callable[..., Any], announce: Callable[[], None]) -> Callable[..., Any]:
    def announced(*args: Any, **kwargs: Any) -> Any:
        announce()
        return step(*args, **kwargs)

    return announced
