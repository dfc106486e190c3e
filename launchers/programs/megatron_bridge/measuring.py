"""What measures while Bridge trains: a callback that is called before and after each of its steps."""

from collections.abc import Callable
from contextlib import ExitStack
from math import nan
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from launchers.programs.harness.measure import measured_enough
from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.rank import ACCOUNTED_STEPS, TimedSteps
from launchers.programs.harness.report import Monitor
from tuner.trial.contract import TrialSpec

_LOSS = "lm loss"
"""What Bridge calls the mean loss a token."""


class Measuring(Callback):  # type: ignore[misc]
    """Times every step, checks its loss, and ends the training once enough is known.

    Args:
        account: What accounts the tensors on CPU; it is entered here, since it must end within the training.
    """

    def __init__(self, spec: TrialSpec, monitor: Monitor, account: TensorAccount | None) -> None:
        self.spec, self.monitor = spec, monitor
        self.steps = TimedSteps(spec, monitor, account)
        self.accounting = ExitStack()
        if account is not None:
            self.accounting.enter_context(account)
        self.above_ms: float | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """The model stands."""
        optimizer: Any = context.optimizer
        optimizer.step = _announced(optimizer.step, lambda: self.monitor.enter_part("optimizer"))
        self.monitor.enter("warmup")

    def on_train_step_start(self, context: CallbackContext) -> None:
        """All ranks begin at once."""
        self.steps.begin()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Keep the step, and end the training where enough is known; raises NonFiniteLossError as `keep` does."""
        device: Any = torch.cuda.current_device()
        self.steps.stop(device)
        self.steps.keep(_shared_loss(context, device), float(context.grad_norm or 0.0))
        self._enter_phase()
        if self._knows_enough():
            context.state.cfg.train.train_iters = context.state.train_state.step + 1

    def on_train_end(self, context: CallbackContext) -> None:
        """Report, while the ranks are still together."""
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
