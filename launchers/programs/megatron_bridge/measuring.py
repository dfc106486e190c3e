"""Measures while Bridge trains, by a callback that Bridge calls before and after each step."""

from collections.abc import Callable
from contextlib import ExitStack
from math import nan
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from launchers.programs.harness.measure import measured_enough
from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.rank import ACCOUNTED_STEPS, TimedSteps
from tuner.trial.contract import TrialSpec

_LOSS = "lm loss"
"""Bridge's name for the mean loss per token."""


class Measuring(Callback):  # type: ignore[misc]
    """Times every step, checks its loss, and ends the training once enough steps are timed or the trial is too slow.

    Args:
        spec: The trial.
        monitor: Tracks the phase and the step of this rank.
        account: Counts the bytes of tensors on CPU; None on CUDA. It is entered here, since it must be left during the
            training.
    """

    def __init__(self, spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
        self.spec, self.monitor = spec, monitor
        self.steps = TimedSteps(spec, monitor, account)
        self.accounting = ExitStack()
        if account is not None:
            self.accounting.enter_context(account)
        self.above_ms: float | None = None
        """The lower bound of the step time, in ms, for which the trial was given up; None if it was not."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Enter the warm-up, now that the model is built."""
        optimizer: Any = context.optimizer
        optimizer.step = _announced(optimizer.step, lambda: self.monitor.enter_part("optimizer"))
        self.monitor.enter("warmup")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin a step on all ranks at the same time."""
        self.steps.begin()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Store the step, and end the training once enough is known.

        Raises:
            NonFiniteLossError: on every rank, if the loss or the norm of the gradients is not finite.
        """
        device: Any = torch.cuda.current_device()
        self.steps.stop(device)
        self.steps.keep(_shared_loss(context, device), float(context.grad_norm or 0.0))
        self._enter_phase()
        if self._knows_enough():
            context.state.cfg.train.train_iters = context.state.train_state.step + 1

    def on_train_end(self, context: CallbackContext) -> None:
        """Write the result while all ranks still run."""
        self.steps.report(self.above_ms)

    def _enter_phase(self) -> None:
        done = len(self.steps.times_ms)
        if done == 1:
            self.monitor.enter("memory")
        if done == ACCOUNTED_STEPS:
            self.accounting.close()
            self.monitor.enter("warmup")
        if done == self.spec.measurement.warmup_steps:
            self.monitor.enter("measure")

    def _knows_enough(self) -> bool:
        if measured_enough(self.steps.measured_ms, self.spec.measurement):
            return True
        self.above_ms = self.steps.slower_than_ms()
        return self.above_ms is not None


def _shared_loss(context: CallbackContext, device: Any) -> float:
    """Return the step's loss on every rank, though only the last pipeline stage has it; NaN if no rank has it."""
    local_loss = (context.loss_dict or {}).get(_LOSS)
    sum_and_count = torch.zeros(2, dtype=torch.float64, device=device)
    if local_loss is not None:
        sum_and_count[0], sum_and_count[1] = float(local_loss), 1.0
    dist.all_reduce(sum_and_count)
    total, ranks = sum_and_count.tolist()
    return total / ranks if ranks else nan


def _announced(step: Callable[..., Any], announce: Callable[[], None]) -> Callable[..., Any]:
    """Return a function that calls `announce` and then `step`."""

    def announced(*args: Any, **kwargs: Any) -> Any:
        announce()
        return step(*args, **kwargs)

    return announced
