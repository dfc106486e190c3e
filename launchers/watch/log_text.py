"""What the text of a job's logs says of its end: known failures, exceptions, and torchrun's report."""

import re
from typing import Final

from tuner.trial.contract import Failure, Outcome
from tuner.trial.failure_texts import BROKEN_MACHINE, COMMUNICATION, OUT_OF_MEMORY, WATCHDOG

BROKEN_MACHINE_LINE: Final = re.compile(rf"^(?!.*warning).*(?:{BROKEN_MACHINE.pattern})", re.IGNORECASE)
"""A line of a log that reports a broken machine. A warning does not: torch warns of a missing driver on a CPU too."""
LAST_WORDS: Final = (
    (BROKEN_MACHINE_LINE, Outcome.INFRASTRUCTURE),
    (OUT_OF_MEMORY, Outcome.OOM),
    (WATCHDOG, Outcome.HANG),
    (COMMUNICATION, Outcome.COMMUNICATION),
)
"""What a rank may print before it dies of a signal, and the outcome that this means."""

_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|OutOfResources))(?:: (.*))?$", re.M
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


def last_exception(text: str) -> Failure | None:
    """Return the last exception in a rank's output, torchrun's own report aside; its time is not known and set to 0."""
    exceptions = [match for match in _EXCEPTION.finditer(text) if _TORCHRUN_ERROR not in match[1]]
    if not exceptions:
        return None
    last = exceptions[-1]
    return Failure(kind=last[1], message=last[2] or "", traceback=text[: last.end()], time_s=0.0)
