"""Tells the outcome of a trial from the exception of a rank: the only code that reads exception names and messages."""

import builtins
import re
from collections.abc import Sequence
from typing import Final

from tuner.trial.contract import Failure, Outcome, Phase, RankRecord
from tuner.trial.failure_texts import BROKEN_MACHINE, COMMUNICATION, DEVICE, OUT_OF_MEMORY

_OOM_KINDS = ("OutOfMemoryError", "MemoryError")
_COMMUNICATION_KINDS = ("torch.distributed.", "torch._C._distributed_c10d.")
_DEVICE_KINDS = ("AcceleratorError",)
_NON_FINITE = "NonFiniteLossError"
"""The class name of the exception by which a program says that the loss is NaN or infinite."""
_NON_FINITE_TEXTS = ("found nan in local", "found inf in local")
"""Parts of Megatron's messages about a loss or gradients that are not finite (losses.py, param_and_grad_buffer.py)."""
_REFUSAL: Final = re.compile(
    r'  File "(?:(?!.*/lib/python3)|.*/(?:megatron|transformer_engine|launchers/programs)/)[^"]*", line \d+, in .*\n'
    r"(?:\[rank\d+\]:)?\s*(?:raise|assert)\b"
)
"""The innermost frame of a traceback if Megatron, Transformer Engine, megatune or the user's own code, which is not in
Python's library folders, states `raise` or `assert`."""


def outcome_of_failure(failure: Failure, phase: Phase, step: int) -> tuple[Outcome, str]:
    """Tell what an exception of a rank means for the trial.

    Before the first step has ended, an exception that Megatron itself raises means that it refuses the layout. An
    exception that comes from elsewhere, with a text that is not known, is unexplained: the machine may be at fault.

    Args:
        failure: the exception.
        phase: what the rank did when it was raised.
        step: how many optimizer steps the rank had finished.

    Returns:
        The outcome of the trial, and a reason of one line that names the exception, the phase and the step.
    """
    message = " ".join(failure.message.split())
    reason = f"{failure.kind.rpartition('.')[2]} in {phase} after {step} steps: {message[:300]}"
    return _outcome(failure.kind, message, failure.traceback, step), reason


def _outcome(kind: str, message: str, traceback: str, step: int) -> Outcome:
    text, lowered = f"{kind}: {message}", message.lower()
    if kind.endswith(_NON_FINITE) or any(part in lowered for part in _NON_FINITE_TEXTS):
        return Outcome.NAN
    if BROKEN_MACHINE.search(text):
        return Outcome.INFRASTRUCTURE
    if kind.endswith(_OOM_KINDS) or OUT_OF_MEMORY.search(text) or "out of memory" in lowered:
        return Outcome.OOM
    if kind.startswith(_COMMUNICATION_KINDS) or COMMUNICATION.search(text):
        return Outcome.COMMUNICATION
    if step or kind.endswith(_DEVICE_KINDS) or DEVICE.search(text) or _is_of_the_system(kind):
        return Outcome.INFRASTRUCTURE
    innermost = traceback[traceback.rfind('  File "') :]
    return Outcome.INVALID if _REFUSAL.match(innermost) else Outcome.UNEXPLAINED


def cause_of(records: Sequence[RankRecord]) -> RankRecord | None:
    """Return the record of the rank whose failure is the cause of the others; None if no rank failed.

    The cause is the earliest failure that is no failure of communication, since a rank whose peer died sees a closed
    connection. If all are failures of communication, it is the earliest of those.
    """
    failed = [(record.failure, record) for record in records if record.failure]

    def order(pair: tuple[Failure, RankRecord]) -> tuple[bool, float]:
        failure, record = pair
        outcome, _ = outcome_of_failure(failure, record.phase, record.step)
        return outcome is Outcome.COMMUNICATION, failure.time_s

    return min(failed, key=order)[1] if failed else None


def _is_of_the_system(kind: str) -> bool:
    """Return whether builtin exceptions named `kind` report a failure of the system, such as a lost file."""
    exception = getattr(builtins, kind, None)
    if not isinstance(exception, type) or not issubclass(exception, BaseException):
        return False
    of_the_system = (OSError, EOFError, ImportError, SystemError)
    return issubclass(exception, of_the_system) or not issubclass(exception, Exception)
