"""Derives the outcome of a trial from the exceptions of its ranks; no other code interprets exceptions."""

import builtins
import re
from collections.abc import Sequence
from typing import Final

from tuner.trial.contract import Failure, Outcome, Phase, RankRecord
from tuner.trial.failure_texts import BROKEN_MACHINE, COMMUNICATION, DEVICE, OUT_OF_MEMORY

_OOM_KINDS = ("OutOfMemoryError", "MemoryError")
_COMMUNICATION_KINDS = ("torch.distributed.", "torch._C._distributed_c10d.")
_DEVICE_KINDS = ("AcceleratorError",)
_OWN_KINDS = ("tuner.errors.",)
"""What megatune itself says of a program that cannot run, whatever the layout."""
_NON_FINITE = "NonFiniteLossError"
"""The name of the exception class that a program raises if the loss is NaN or infinite."""
_NON_FINITE_TEXTS = ("found nan in local", "found inf in local")
"""Parts of Megatron's messages about a loss or gradients that are not finite (losses.py, param_and_grad_buffer.py)."""
_REFUSAL: Final = re.compile(
    r'  File "(?:(?!.*/lib/python3)|.*/(?:megatron|transformer_engine|launchers/programs)/)[^"]*", line \d+, in .*\n'
    r"(?:\[rank\d+\]:)?\s*(?:raise|assert)\b"
)
"""Matches the innermost frame of a traceback if it is a `raise` or `assert` of Megatron, Transformer Engine, megatune's
programs, or the user's own code (any file outside Python's library folders)."""


def outcome_of_failure(failure: Failure, phase: Phase, step: int) -> tuple[Outcome, str]:
    """Return the outcome that an exception of a rank means for the trial, and the reason in one line.

    A known exception class or text determines the outcome, such as OOM. Any other exception means INFRASTRUCTURE if the
    rank had finished a step. If it had not, the exception means INVALID if a `raise` or `assert` of Megatron,
    Transformer Engine, megatune or the user's code raised it, and otherwise UNEXPLAINED: the machine may be at fault.

    Args:
        failure: the exception.
        phase: the phase of the rank when the exception was raised.
        step: the number of optimizer steps that the rank had finished.

    Returns:
        The outcome of the trial, and a reason that names the exception, the phase and the step.
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
    if step or kind.startswith(_OWN_KINDS) or kind.endswith(_DEVICE_KINDS):
        return Outcome.INFRASTRUCTURE
    if DEVICE.search(text) or _is_of_the_system(kind):
        return Outcome.INFRASTRUCTURE
    innermost = traceback[traceback.rfind('  File "') :]
    return Outcome.INVALID if _REFUSAL.match(innermost) else Outcome.UNEXPLAINED


def cause_of(records: Sequence[RankRecord]) -> RankRecord | None:
    """Return the record of the rank whose failure caused the failures of the other ranks; None if no rank failed.

    It is the earliest failure with another outcome than COMMUNICATION, since a rank whose peer died fails with a closed
    connection. If all failures have the outcome COMMUNICATION, it is the earliest of them.
    """
    failed = [(record.failure, record) for record in records if record.failure]

    def order(pair: tuple[Failure, RankRecord]) -> tuple[bool, float]:
        failure, record = pair
        outcome, _ = outcome_of_failure(failure, record.phase, record.step)
        return outcome is Outcome.COMMUNICATION, failure.time_s

    return min(failed, key=order)[1] if failed else None


def _is_of_the_system(kind: str) -> bool:
    """Return whether `kind` names a builtin exception that means a failure of the system, such as a missing file."""
    exception = getattr(builtins, kind, None)
    if not isinstance(exception, type) or not issubclass(exception, BaseException):
        return False
    of_the_system = (OSError, EOFError, ImportError, SystemError)
    return issubclass(exception, of_the_system) or not issubclass(exception, Exception)
