"""Decides how a trial ended, from its evidence alone.

torchrun exits with 1 whatever happened, so its exit code says little. The records of the program and its ranks count
first, then the signal that ended the first failing rank, then the text of the logs; the kernel's counters tell whether
a process was killed for memory. One failing rank makes the other ranks fail too: their communication errors are
consequences, and so are the signals by which torchrun ends them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from signal import SIGKILL, SIGTERM, Signals

from launchers.watch.evidence import JobEvidence
from launchers.watch.limits import LEAST_SILENCE_S, SILENT_STEPS
from launchers.watch.log_text import BROKEN_MACHINE_LINE, LAST_WORDS, first_line, last_exception
from tuner.trial.contract import Outcome, Phase
from tuner.trial.failure_texts import COMMUNICATION, FULL_DISK, OUT_OF_MEMORY
from tuner.trial.outcomes import cause_of, outcome_of_failure

_FULL_BYTES = 64 << 10
"""A disk with less free space than this counts as full. Assumed: a result alone needs a few KiB."""
_REASON_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a trial ended: the outcome, the reason in one line, and, if known, the phase and the rank."""

    outcome: Outcome
    reason: str
    phase: Phase | None = None
    rank: int | None = None


def classify(evidence: JobEvidence) -> Judgement:
    """Return how the trial ended, as the first function of `_RULES` that recognises the evidence judges it."""
    judgements = (rule(evidence) for rule in _RULES)
    judgement = next(filter(None, judgements), None) or _unexplained(evidence)
    if judgement.outcome is Outcome.OOM and evidence.occupied_gpus:
        judgement = replace(judgement, reason=f"{'; '.join(evidence.occupied_gpus)}: {judgement.reason}")
    return replace(judgement, reason=" ".join(judgement.reason.split())[:_REASON_CHARACTERS])


def _survivors(evidence: JobEvidence) -> Judgement | None:
    if not evidence.survivors:
        return None
    pids = ", ".join(map(str, evidence.survivors))
    reason = (
        f"process {pids} cannot be ended even by SIGKILL and may hold the GPU: look at the driver, or reboot"
    )
    return Judgement(Outcome.INFRASTRUCTURE, reason, evidence.phase)


def _held_gpus(evidence: JobEvidence) -> Judgement | None:
    if not evidence.held_gpus:
        return None
    reason = f"the GPUs are not as free as before the trial: {'; '.join(evidence.held_gpus)}"
    return Judgement(Outcome.INFRASTRUCTURE, reason, evidence.phase)


def _clean_end(evidence: JobEvidence) -> Judgement | None:
    if evidence.exit_code != 0 or evidence.result is None:
        return None
    result = evidence.result
    return Judgement(result.outcome, result.reason, result.phase, result.rank)


def _recorded_failure(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the failure that a rank or the program recorded, or None.

    A recorded loss of a connection gives None here, since the failure of another rank may be its cause.
    """
    judgements = (_rank_record(evidence), _program_result(evidence))
    return next((each for each in judgements if each and each.outcome is not Outcome.COMMUNICATION), None)


def _rank_record(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the first failure that a rank recorded before the launcher ended the job, or None."""
    in_time = [
        record
        for record in evidence.records
        if record.failure is not None and record.failure.time_s < evidence.ended_at_s
    ]
    record = cause_of(in_time)
    if record is None or record.failure is None:
        return None
    failure = record.failure
    if FULL_DISK.search(failure.message):
        return _full_disk(evidence, failure.message, record.rank)
    outcome, reason = outcome_of_failure(failure, record.phase, record.step)
    return Judgement(outcome, reason, record.phase, record.rank)


def _stopped(evidence: JobEvidence) -> Judgement | None:
    if evidence.ending != "stop":
        return None
    return Judgement(Outcome.INTERRUPTED, f"ended on request in {evidence.phase}", evidence.phase)


def _signal(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the signal that ended the first failed rank or the job's first process, or None.

    A signal that torchrun or megatune sent gives None.
    """
    rank, code = _first_exit(evidence)
    if code >= 0 or -code == SIGTERM or (evidence.ending is not None and -code == SIGKILL):
        return None
    who, phase = _who(rank), evidence.phase
    if -code == SIGKILL and evidence.host_oom_kills:
        reason = f"{who} was killed in {phase} by the kernel: the host's memory, or the cgroup's, was full"
        return Judgement(Outcome.OOM, reason, phase, rank)
    if -code != SIGKILL and rank is not None:
        for pattern, outcome in LAST_WORDS:
            if line := first_line(evidence.tails.get(rank, ""), pattern):
                return Judgement(outcome, f"died in {phase}: {line}", phase, rank)
    name = Signals(-code).name if -code in {*Signals} else f"signal {-code}"
    reason = f"{who} died in {phase} of {name}, which megatune did not send"
    return Judgement(Outcome.INFRASTRUCTURE, reason, phase, rank)


def _first_exit(evidence: JobEvidence) -> tuple[int | None, int]:
    """Return the first rank that failed and its exit code.

    If no rank is known to have failed, return None and the exit code of the job's first process, or None and 0 if the
    launcher ended the job.
    """
    if evidence.exit_codes:
        return next(iter(evidence.exit_codes.items()))
    return None, (evidence.exit_code or 0) if evidence.ending is None else 0


def _who(rank: int | None) -> str:
    return "the launcher" if rank is None else f"rank {rank}"


def _program_result(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the failure that the program reported before the launcher ended the job, or None."""
    result = evidence.result
    if result is None or result.outcome is Outcome.COMPLETED or evidence.result_at_s >= evidence.ended_at_s:
        return None
    return Judgement(result.outcome, result.reason, result.phase, result.rank)


def _limit(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the time limit for which the launcher ended the job, or None."""
    phase, limits = evidence.phase, evidence.limits
    if evidence.ending == "startup":
        reason = f"no optimizer step within {limits.startup_s:g} s (limits.startup_s); last seen in {phase}"
        return Judgement(Outcome.HANG, reason, phase)
    if evidence.ending == "step":
        return Judgement(Outcome.HANG, _silence(evidence), phase)
    if evidence.ending == "trial":
        reason = f"not finished within {limits.trial_s:g} s (limits.trial_s); last seen in {phase}"
        return Judgement(Outcome.TIMEOUT, reason, phase)
    return None


def _silence(evidence: JobEvidence) -> str:
    if evidence.silence_s < evidence.limits.step_s:
        why = f"{SILENT_STEPS} times the slowest step so far, at least {LEAST_SILENCE_S:g} s"
    else:
        why = "limits.step_s"
    silence_s = min(evidence.silence_s, evidence.limits.step_s)
    return f"no heartbeat for {silence_s:.3g} s ({why}) after step {evidence.step}; last seen in {evidence.phase}"


def _disk(evidence: JobEvidence) -> Judgement | None:
    judgement = _text(evidence, FULL_DISK, Outcome.INFRASTRUCTURE)
    if judgement:
        return _full_disk(evidence, judgement.reason, judgement.rank)
    if evidence.free_bytes < _FULL_BYTES:  # on a full disk, nothing more can be written to the logs
        return _full_disk(evidence, f"{evidence.free_bytes / 1024:.0f} KiB are free", None)
    return None


def _full_disk(evidence: JobEvidence, message: str, rank: int | None) -> Judgement:
    reason = f"no space left in {evidence.phase} on the disk of {evidence.folder}, or another: {message}"
    return Judgement(Outcome.INFRASTRUCTURE, reason, evidence.phase, rank)


def _traceback(evidence: JobEvidence) -> Judgement | None:
    """Return the judgement by the last exception that a rank printed but did not record, or None.

    An example is an import error.
    """
    for rank in evidence.ranks_by_failure():
        if exception := last_exception(evidence.tails[rank]):
            outcome, reason = outcome_of_failure(exception, evidence.phase, evidence.step)
            return Judgement(outcome, reason, evidence.phase, rank)
    return None


def _broken_machine_text(evidence: JobEvidence) -> Judgement | None:
    return _text(evidence, BROKEN_MACHINE_LINE, Outcome.INFRASTRUCTURE)


def _out_of_memory_text(evidence: JobEvidence) -> Judgement | None:
    return _text(evidence, OUT_OF_MEMORY, Outcome.OOM)


def _communication_text(evidence: JobEvidence) -> Judgement | None:
    return _text(evidence, COMMUNICATION, Outcome.COMMUNICATION)


def _text(evidence: JobEvidence, pattern: re.Pattern[str], outcome: Outcome) -> Judgement | None:
    """Return a judgement with `outcome` and the first log line that `pattern` matches as its reason, or None."""
    for rank in evidence.ranks_by_failure():
        if line := first_line(evidence.tails[rank], pattern):
            return Judgement(outcome, line, evidence.phase, rank)
    if line := first_line(evidence.launcher_tail, pattern):
        return Judgement(outcome, f"the launcher: {line}", evidence.phase)
    return None


def _unexplained(evidence: JobEvidence) -> Judgement:
    rank = next(iter(evidence.exit_codes), None)
    code = evidence.exit_code if rank is None else evidence.exit_codes[rank]
    if evidence.result is not None:
        end = "the program finished, and then did not end well"
    elif evidence.result_error:
        end = f"the program's result cannot be read ({evidence.result_error})"
    else:
        end = "the program left no result"
    reason = f"{end}: {_who(rank)} ended with exit code {code} in {evidence.phase}"
    output = evidence.launcher_tail if rank is None else evidence.tails.get(rank, "")
    if code and (lines := output.strip().splitlines()):
        reason += f"; the last line of its output: {lines[-1]}"
    return Judgement(Outcome.INFRASTRUCTURE, reason, evidence.phase, rank)


_RULES: tuple[Callable[[JobEvidence], Judgement | None], ...] = (
    _survivors,
    _held_gpus,
    _clean_end,
    _recorded_failure,
    _stopped,
    _signal,
    _out_of_memory_text,
    _rank_record,
    _program_result,
    _limit,
    _disk,
    _broken_machine_text,
    _traceback,
    _communication_text,
)
"""Functions that judge by one part of the evidence, the most trustworthy first; the module's docstring says why."""
