"""How a trial ended, decided from its evidence; pure.

torchrun ends with 1 whatever happened, so its exit code says little. What the program and its ranks recorded comes
first, then the signal that the first failing rank died of, then the text of the logs; the kernel's counters tell
whether a kill was for memory. One failing rank makes its peers fail too: their communication errors are consequences,
and so are the signals that torchrun ends them with.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

from launchers.watch.limits import LEAST_SILENCE_S, SILENT_STEPS, Ending
from tuner.trial.contract import Heartbeat, Limits, Outcome, Phase, RankRecord, TrialResult
from tuner.trial.outcomes import cause_of, outcome_of_failure

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|Cuda failure 2 'out of memory'"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
)
_WATCHDOG = re.compile(r"Watchdog caught collective operation timeout")
_COMMUNICATION = re.compile(
    r"NCCL error|ncclUnhandledCudaError|ncclRemoteError|ncclSystemError|DistBackendError|DistNetworkError"
    r"|Rendezvous\w*Error|EADDRINUSE|[Aa]ddress already in use|gloo/transport"
    r"|[Cc]onnection (closed by peer|refused|reset by peer)"
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")
_FULL_BYTES = 64 << 10
_LAST_WORDS = (
    (_OUT_OF_MEMORY, Outcome.OOM),
    (_WATCHDOG, Outcome.HANG),
    (_COMMUNICATION, Outcome.COMMUNICATION),
)
"""What a crashing rank may say before its signal, and what that means."""
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt))(?:: (.*))?$", re.M
)
_TORCHRUNS_OWN = "ChildFailedError"
"""With which a torchrun that a command started tells of its ranks."""
_REPORT = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is left of a job after its last process is gone."""

    limits: Limits
    folder: Path = Path()
    """The trial's."""
    exit_code: int | None
    """The launcher process's, negative for a signal; None if it could not be reaped."""
    ending: Ending | None = None
    """Why we ended the job; None if it ended by itself."""
    ended_at_s: float = float("inf")
    """When we did, in seconds since the epoch: what failed later failed because of it."""
    silence_s: float = float("inf")
    """How long the job might be silent when we did; limits.step_s, or less where its steps were known."""
    survivors: tuple[int, ...] = ()
    """Process ids that even SIGKILL did not end."""
    free_bytes: float = float("inf")
    """Of the folder's disk, at the end."""
    held_gpus: tuple[str, ...] = ()
    """What is not given back of each GPU that is fuller than before the job."""
    result: TrialResult | None = None
    """What the program left."""
    result_at_s: float = 0.0
    """When it was written, in seconds since the epoch."""
    result_error: str = ""
    """Why the program's result cannot be read; empty if it can or there is none."""
    records: tuple[RankRecord, ...] = ()
    heartbeat: Heartbeat | None = None
    slower_than_ms: float | None = None
    """A lower bound of the step time."""
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    """Of the failed ranks, the first to fail first."""
    tails: Mapping[int, str] = field(default_factory=dict)
    """The end of each rank's output."""
    launcher_tail: str = ""
    """The end of the launcher's own output."""
    host_oom_kills: int = 0
    """Processes that the kernel killed for memory while the job ran."""

    @property
    def phase(self) -> Phase:
        """Where the job was last seen."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def step(self) -> int:
        """Optimizer steps finished when last seen."""
        return self.heartbeat.step if self.heartbeat else 0

    def ranks_by_failure(self) -> list[int]:
        """The ranks with output, the first to fail first."""
        first = [rank for rank in self.exit_codes if rank in self.tails]
        return first + [rank for rank in sorted(self.tails) if rank not in self.exit_codes]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a trial ended: the outcome, why in one line, and where."""

    outcome: Outcome
    reason: str
    phase: Phase | None = None
    rank: int | None = None


def classify(evidence: Evidence) -> Verdict:
    """Decide how the trial ended: the first rule that recognises the evidence."""
    verdicts = (rule(evidence) for rule in _RULES)
    verdict = next((verdict for verdict in verdicts if verdict is not None), None) or _unexplained(evidence)
    return Verdict(verdict.outcome, " ".join(verdict.reason.split())[:400], verdict.phase, verdict.rank)


def failed_ranks(report: str) -> dict[int, int]:
    """Read the ranks' exit codes out of torchrun's failure report, the root cause first; else empty."""
    others, _, root = report.partition("Root Cause (first observed failure)")
    return {int(rank): int(code) for part in (root, others) for rank, code in _REPORT.findall(part)}


def _survivors(evidence: Evidence) -> Verdict | None:
    if not evidence.survivors:
        return None
    pids = ", ".join(map(str, evidence.survivors))
    reason = (
        f"process {pids} cannot be ended even by SIGKILL and may hold the GPU: look at the driver, or reboot"
    )
    return Verdict(Outcome.INFRASTRUCTURE, reason, evidence.phase)


def _held_gpus(evidence: Evidence) -> Verdict | None:
    if not evidence.held_gpus:
        return None
    reason = f"the GPUs are not as free as before the trial: {'; '.join(evidence.held_gpus)}"
    return Verdict(Outcome.INFRASTRUCTURE, reason, evidence.phase)


def _clean_end(evidence: Evidence) -> Verdict | None:
    if evidence.exit_code != 0 or evidence.result is None:
        return None
    result = evidence.result
    return Verdict(result.outcome, result.reason, result.phase, result.rank)


def _recorded_failure(evidence: Evidence) -> Verdict | None:
    """What the program said of itself; a lost connection may well be another rank's failure."""
    verdicts = (_record(evidence), _program_result(evidence))
    return next((each for each in verdicts if each and each.outcome is not Outcome.COMMUNICATION), None)


def _record(evidence: Evidence) -> Verdict | None:
    in_time = [
        record
        for record in evidence.records
        if record.failure is not None and record.failure.time_s < evidence.ended_at_s
    ]
    record = cause_of(in_time)
    if record is None or record.failure is None:
        return None
    failure = record.failure
    if _DISK.search(failure.message):
        return _full_disk(evidence, failure.message, record.rank)
    outcome, reason = outcome_of_failure(failure.kind, failure.message, record.phase, record.step)
    return Verdict(outcome, reason, record.phase, record.rank)


def _stopped(evidence: Evidence) -> Verdict | None:
    if evidence.ending != "stop":
        return None
    return Verdict(Outcome.INTERRUPTED, f"ended on request in {evidence.phase}", evidence.phase)


def _out_of_memory_text(evidence: Evidence) -> Verdict | None:
    return _text(evidence, _OUT_OF_MEMORY, Outcome.OOM)


def _signal(evidence: Evidence) -> Verdict | None:
    """The first rank to fail, or the launcher itself, died of a signal that nobody here sent."""
    codes: list[tuple[int | None, int]] = [*evidence.exit_codes.items()]
    if evidence.ending is None:
        codes.append((None, evidence.exit_code or 0))
    rank, code = codes[0] if codes else (None, 0)
    if code >= 0 or -code == SIGTERM or (evidence.ending is not None and -code == SIGKILL):
        return None
    who = "the launcher" if rank is None else f"rank {rank}"
    phase = evidence.phase
    if -code == SIGKILL and evidence.host_oom_kills:
        reason = f"{who} was killed in {phase} by the kernel: the host's memory, or the cgroup's, was full"
        return Verdict(Outcome.OOM, reason, phase, rank)
    if -code != SIGKILL and rank is not None:
        for pattern, outcome in _LAST_WORDS:
            if line := _line(evidence.tails.get(rank, ""), pattern):
                return Verdict(outcome, f"died in {phase}: {line}", phase, rank)
    name = Signals(-code).name if -code in {*Signals} else f"signal {-code}"
    return Verdict(
        Outcome.INFRASTRUCTURE, f"{who} died in {phase} of {name}, which nobody here sent", phase, rank
    )


def _program_result(evidence: Evidence) -> Verdict | None:
    result = evidence.result
    if result is None or result.outcome is Outcome.COMPLETED or evidence.result_at_s >= evidence.ended_at_s:
        return None
    return Verdict(result.outcome, result.reason, result.phase, result.rank)


def _limit(evidence: Evidence) -> Verdict | None:
    phase, limits = evidence.phase, evidence.limits
    if evidence.ending == "startup":
        reason = f"no optimizer step within {limits.startup_s:g} s (limits.startup_s); last seen in {phase}"
    elif evidence.ending == "step":
        if evidence.silence_s < limits.step_s:
            why = f"{SILENT_STEPS} times the slowest step so far, at least {LEAST_SILENCE_S:g} s"
        else:
            why = "limits.step_s"
        silence_s = min(evidence.silence_s, limits.step_s)
        reason = (
            f"no heartbeat for {silence_s:.3g} s ({why}) after step {evidence.step}; last seen in {phase}"
        )
    elif evidence.ending == "trial":
        reason = f"not finished within {limits.trial_s:g} s (limits.trial_s); last seen in {phase}"
        return Verdict(Outcome.TIMEOUT, reason, phase)
    else:
        return None
    return Verdict(Outcome.HANG, reason, phase)


def _disk(evidence: Evidence) -> Verdict | None:
    verdict = _text(evidence, _DISK, Outcome.INFRASTRUCTURE)
    if verdict:
        return _full_disk(evidence, verdict.reason, verdict.rank)
    if evidence.free_bytes < _FULL_BYTES:  # where nothing could be written, nothing says so
        return _full_disk(evidence, f"{evidence.free_bytes / 1024:.0f} KiB are free", None)
    return None


def _full_disk(evidence: Evidence, said: str, rank: int | None) -> Verdict:
    reason = f"no space left in {evidence.phase} on the disk of {evidence.folder}, or another: {said}"
    return Verdict(Outcome.INFRASTRUCTURE, reason, evidence.phase, rank)


def _traceback(evidence: Evidence) -> Verdict | None:
    """The last exception that a rank printed without living to record it, an import error for one."""
    for rank in evidence.ranks_by_failure():
        found = [
            match for match in _EXCEPTION.finditer(evidence.tails[rank]) if _TORCHRUNS_OWN not in match[1]
        ]
        if found:
            kind, message = found[-1].group(1), found[-1].group(2) or ""
            outcome, reason = outcome_of_failure(kind, message, evidence.phase, evidence.step)
            return Verdict(outcome, reason, evidence.phase, rank)
    return None


def _communication_text(evidence: Evidence) -> Verdict | None:
    return _text(evidence, _COMMUNICATION, Outcome.COMMUNICATION)


def _text(evidence: Evidence, pattern: re.Pattern[str], outcome: Outcome) -> Verdict | None:
    for rank in evidence.ranks_by_failure():
        if line := _line(evidence.tails[rank], pattern):
            return Verdict(outcome, line, evidence.phase, rank)
    if line := _line(evidence.launcher_tail, pattern):
        return Verdict(outcome, f"the launcher: {line}", evidence.phase)
    return None


def _line(text: str, pattern: re.Pattern[str]) -> str:
    return next((line.strip() for line in text.splitlines() if pattern.search(line)), "")


def _unexplained(evidence: Evidence) -> Verdict:
    rank = next(iter(evidence.exit_codes), None)
    code = evidence.exit_code if rank is None else evidence.exit_codes[rank]
    who = "the launcher" if rank is None else f"rank {rank}"
    if evidence.result is not None:
        end = "the program finished, and then did not end well"
    elif evidence.result_error:
        end = f"the program's result cannot be read ({evidence.result_error})"
    else:
        end = "the program left no result"
    reason = f"{end}: {who} ended with exit code {code} in {evidence.phase}"
    output = evidence.launcher_tail if rank is None else evidence.tails.get(rank, "")
    if code and (lines := output.strip().splitlines()):
        reason += f"; its last words: {lines[-1]}"
    return Verdict(Outcome.INFRASTRUCTURE, reason, evidence.phase, rank)


_RULES: tuple[Callable[[Evidence], Verdict | None], ...] = (
    _survivors,
    _held_gpus,
    _clean_end,
    _recorded_failure,
    _stopped,
    _signal,
    _out_of_memory_text,
    _record,
    _program_result,
    _limit,
    _disk,
    _traceback,
    _communication_text,
)
"""The order of belief: see the module's text."""
