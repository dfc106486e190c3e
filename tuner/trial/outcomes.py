"""Tells the outcome of a trial from the exception of a rank: the only code that reads exception names and messages."""

import builtins
from collections.abc import Sequence

from tuner.trial.contract import Failure, Outcome, Phase, RankRecord

_OOM_KINDS = ("OutOfMemoryError", "MemoryError")
_OOM_TEXTS = (
    "out of memory",  # also "CUDA error: out of memory" and NCCL's "Cuda failure 'out of memory'"
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "defaultcpuallocator",  # torch's CPU allocator: "can't allocate memory" or "not enough memory"
)
_COMMUNICATION_KINDS = ("torch.distributed.", "torch._C._distributed_c10d.")
_COMMUNICATION_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "address already in use",  # a port of the rendezvous that was lost to another process
    "broken pipe",
    "socket timeout",
    "third_party/gloo",
    "gloo/transport",
    "nccl error",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
    "timed out waiting",
    "wait timeout",
)
_DEVICE_TEXTS = ("cuda error", "cuda driver error", "uncorrectable ecc", "no cuda gpus are available")
_NON_FINITE = "NonFiniteLossError"
"""The class name of the exception by which a program says that the loss is NaN or infinite."""
_NON_FINITE_TEXTS = ("found nan in local", "found inf in local")
"""Parts of Megatron's messages about a loss or gradients that are not finite (losses.py, param_and_grad_buffer.py)."""


def outcome_of_failure(kind: str, message: str, phase: Phase, step: int) -> tuple[Outcome, str]:
    """Tell what an exception of a rank means for the trial.

    A Python exception before the first step has ended means that Megatron refuses the layout.

    Args:
        kind: the exception's qualified name; builtins without their module.
        message: the exception's message.
        phase: what the rank did when it was raised.
        step: how many optimizer steps the rank had finished.

    Returns:
        The outcome of the trial, and a reason of one line that names the exception, the phase and the step.
    """
    text = " ".join(message.split())
    reason = f"{kind.rpartition('.')[2]} in {phase} after {step} steps: {text[:300]}"
    lowered = text.lower()
    if kind.endswith(_NON_FINITE) or any(part in lowered for part in _NON_FINITE_TEXTS):
        return Outcome.NAN, reason
    if kind.endswith(_OOM_KINDS) or any(part in lowered for part in _OOM_TEXTS):
        return Outcome.OOM, reason
    if kind.startswith(_COMMUNICATION_KINDS) or any(part in lowered for part in _COMMUNICATION_TEXTS):
        return Outcome.COMMUNICATION, reason
    if any(part in lowered for part in _DEVICE_TEXTS) or not _is_refusal(kind):
        return Outcome.INFRASTRUCTURE, reason
    return (Outcome.INVALID if step == 0 else Outcome.INFRASTRUCTURE), reason


def cause_of(records: Sequence[RankRecord]) -> RankRecord | None:
    """Return the record of the rank whose failure is the cause of the others; None if no rank failed.

    The cause is the earliest failure that is no failure of communication, since a rank whose peer died sees a closed
    connection. If all are failures of communication, it is the earliest of those.
    """
    failed = [(record.failure, record) for record in records if record.failure]

    def order(pair: tuple[Failure, RankRecord]) -> tuple[bool, float]:
        failure, record = pair
        outcome, _ = outcome_of_failure(failure.kind, failure.message, record.phase, record.step)
        return outcome is Outcome.COMMUNICATION, failure.time_s

    return min(failed, key=order)[1] if failed else None


def _is_refusal(kind: str) -> bool:
    """Return whether exceptions named `kind` report wrong arguments, and not a failure of the system."""
    exception = getattr(builtins, kind, None)
    return (
        isinstance(exception, type)
        and issubclass(exception, Exception)
        and not issubclass(exception, OSError | EOFError | ImportError | SystemError)
    )
