"""What the failure of a rank means for its trial: the one place that reads exception names and messages."""

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
"""How a program's exception must be named that says that the loss is NaN or infinite."""
_NON_FINITE_TEXTS = ("found nan in local", "found inf in local")
"""Megatron's own words for it, of a loss or a bucket of gradients (losses.py, param_and_grad_buffer.py)."""


def outcome_of_failure(kind: str, message: str, phase: Phase, step: int) -> tuple[Outcome, str]:
    """Return what an exception of a rank means, and a one-line reason.

    `kind` is the exception's qualified name (builtins without module), `step` the optimizer steps finished
    before it. A Python exception before the first step has ended is Megatron refusing the layout.
    """
    text = " ".join(message.split())
    where = f"in {phase} after {step} steps"
    said = f"{kind.rpartition('.')[2]} {where}: {text[:300]}"
    lowered = text.lower()
    if kind.endswith(_NON_FINITE) or any(part in lowered for part in _NON_FINITE_TEXTS):
        return Outcome.NAN, said
    if kind.endswith(_OOM_KINDS) or any(part in lowered for part in _OOM_TEXTS):
        return Outcome.OOM, said
    if kind.startswith(_COMMUNICATION_KINDS) or any(part in lowered for part in _COMMUNICATION_TEXTS):
        return Outcome.COMMUNICATION, said
    if any(part in lowered for part in _DEVICE_TEXTS) or not _is_refusal(kind):
        return Outcome.INFRASTRUCTURE, said
    return (Outcome.INVALID if step == 0 else Outcome.INFRASTRUCTURE), said


def cause_of(records: Sequence[RankRecord]) -> RankRecord | None:
    """Return the record of the rank that failed first; None if none did.

    A rank whose peer died sees a closed connection: that is the cause only where there is nothing else.
    """
    failed = [(record.failure, record) for record in records if record.failure]

    def rank(pair: tuple[Failure, RankRecord]) -> tuple[bool, float]:
        failure, record = pair
        outcome, _ = outcome_of_failure(failure.kind, failure.message, record.phase, record.step)
        return outcome is Outcome.COMMUNICATION, failure.time_s

    return min(failed, key=rank)[1] if failed else None


def _is_refusal(kind: str) -> bool:
    """Whether the exception is one that code raises about its arguments, not the system about itself."""
    exception = getattr(builtins, kind, None)
    return (
        isinstance(exception, type)
        and issubclass(exception, Exception)
        and not issubclass(exception, OSError | EOFError | ImportError | SystemError)
    )
