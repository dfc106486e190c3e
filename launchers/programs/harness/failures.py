"""Reports how a rank failed: in its output, in its record, and in the trial's result."""

import time
import traceback
from contextlib import suppress

from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.results import PeakGib, rank_record, write_result
from tuner.errors import InputError
from tuner.files import read_json, write_json
from tuner.trial.contract import Failure, Outcome, RankRecord, TrialFolder, TrialResult
from tuner.trial.outcomes import cause_of, outcome_of_failure

_CAUSE_S = 1.0
"""How long a rank that lost a connection waits before it ends, in seconds: ten times what torchrun takes to see that a
rank has ended (its monitor interval of 0.1 s)."""


class NonFiniteLossError(Exception):
    """The loss or the norm of the gradients is NaN or infinite."""


def report_failure(monitor: Monitor, error: Exception, peak: PeakGib = (None, None)) -> None:
    """Print this rank's failure, and write it to the rank's record and, if none is written yet, to the trial's result.

    If the disk is full, the writes fail, but the rank still ends. A rank that lost a connection waits a moment, so that
    the launcher sees the other rank end first: that rank's failure may be the cause.
    """
    with suppress(OSError):
        traceback.print_exception(error)
    with suppress(OSError):
        write_failed(monitor, error, peak)
    outcome, _ = outcome_of_failure(failure_of(error), monitor.phase, monitor.step)
    if outcome is Outcome.COMMUNICATION:
        time.sleep(_CAUSE_S)


def write_failed(monitor: Monitor, error: BaseException, peak: PeakGib = (None, None)) -> None:
    """Write this rank's record of its failure, and the trial's result if no other rank has written it."""
    path = monitor.folder.rank_record(monitor.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rank_record(monitor, peak, failure_of(error)))
    if monitor.folder.result.exists():
        return
    records = _written_records(monitor.folder)
    cause = cause_of(records)
    if cause is None or cause.failure is None:
        return
    outcome, reason = outcome_of_failure(cause.failure, cause.phase, cause.step)
    result = TrialResult(outcome=outcome, reason=reason, phase=cause.phase, rank=cause.rank)
    write_result(monitor, result, records)


def failure_of(error: BaseException) -> Failure:
    """Return the description of an error that ended a rank, for the rank's record."""
    return Failure(
        kind=_qualified_name(type(error)),
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        time_s=time.time(),
    )


def _written_records(folder: TrialFolder) -> tuple[RankRecord, ...]:
    records = []
    for path in sorted(folder.rank_record(0).parent.glob("rank*.json")):
        try:
            records.append(read_json(RankRecord, path))
        except InputError:  # another rank is replacing it at this moment
            continue
    return tuple(records)


def _qualified_name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
