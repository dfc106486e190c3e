"""What the text of a job's logs says of its end: known failures, exceptions, and torchrun's report."""

import re
from typing import Final

from tuner.trial.contract import Outcome

OUT_OF_MEMORY: Final = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|Cuda failure 2 'out of memory'"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
)
COMMUNICATION: Final = re.compile(
    r"NCCL error|ncclUnhandledCudaError|ncclRemoteError|ncclSystemError|DistBackendError|DistNetworkError"
    r"|Rendezvous\w*Error|EADDRINUSE|[Aa]ddress already in use|gloo/transport"
    r"|[Cc]onnection (closed by peer|refused|reset by peer)"
)
FULL_DISK: Final = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")
_WATCHDOG = re.compile(r"Watchdog caught collective operation timeout")
LAST_WORDS: Final = (
    (OUT_OF_MEMORY, Outcome.OOM),
    (_WATCHDOG, Outcome.HANG),
    (COMMUNICATION, Outcome.COMMUNICATION),
)
"""What a rank may print before it dies of a signal, and the outcome that this means."""

_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt))(?:: (.*))?$", re.M
)
_TORCHRUN_ERROR = "ChildFailedError"
"""The exception by which a torchrun that a command started reports its ranks' failures; it is never the cause."""
_REPORTED_EXIT = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) ")


def failed_ranks(report: str) -> dict[int, int]:
    """Read the ranks' exit codes out of torchrun's failure report, the root cause first; empty if there is none."""
    other_failures, _, root_cause = report.partition("Root Cause (first observed failure)")
    return {
        int(rank): int(code)
        for part in (root_cause, other_failures)
        for rank, code in _REPORTED_EXIT.findall(part)
    }


def first_line(text: str, pattern: re.Pattern[str]) -> str:
    """Return the first line that the pattern is found in, stripped; empty if there is none."""
    return next((line.strip() for line in text.splitlines() if pattern.search(line)), "")


def last_exception(text: str) -> tuple[str, str] | None:
    """Return the name and the message of the last exception in a rank's output, torchrun's own report aside."""
    exceptions = [match for match in _EXCEPTION.finditer(text) if _TORCHRUN_ERROR not in match[1]]
    return (exceptions[-1][1], exceptions[-1][2] or "") if exceptions else None
