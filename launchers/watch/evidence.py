"""The evidence from which the outcome of a job is decided: what is left of it after its last process has ended."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launchers.watch import logs
from launchers.watch.limits import Ending
from launchers.watch.log_text import failed_ranks
from tuner.errors import InputError
from tuner.files import read_json
from tuner.trial.contract import Heartbeat, Limits, Phase, RankRecord, TrialFolder, TrialResult


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvidence:
    """What a launcher saw of a job, and what the job left in the trial's folder."""

    limits: Limits
    folder: Path = Path()
    """The trial's folder."""
    exit_code: int | None
    """Exit code of the job's first process, negative for a signal; None if it could not be reaped."""
    ending: Ending | None = None
    """Why the launcher ended the job; None if it ended by itself."""
    ended_at_s: float = float("inf")
    """When the launcher ended the job, in seconds since the epoch; failures after this time are its consequences."""
    silence_s: float = float("inf")
    """How long, in seconds, the job could go without a heartbeat: limits.step_s, or less if the times of its steps were
    known."""
    survivors: tuple[int, ...] = ()
    """Ids of the processes that even SIGKILL did not end."""
    free_bytes: float = float("inf")
    """Free space in bytes on the disk of the trial's folder after the job."""
    held_gpus: tuple[str, ...] = ()
    """One line of text for each GPU that is lost, or whose memory the job did not give back."""
    unclear_gpus: tuple[str, ...] = ()
    """One line of text for each GPU that has more memory in use than before the job, by whomever."""
    occupied_gpus: tuple[str, ...] = ()
    """One line of text for each GPU of which others held memory before, during or after the job."""
    result: TrialResult | None = None
    """The result that the program wrote."""
    result_at_s: float = 0.0
    """When the program's result was written, in seconds since the epoch."""
    result_error: str = ""
    """Why the program's result cannot be read; empty if it can, or if there is none."""
    records: tuple[RankRecord, ...] = ()
    """The records that ranks wrote, by rank."""
    heartbeat: Heartbeat | None = None
    """The last heartbeat that was seen."""
    slower_than_ms: float | None = None
    """A lower bound of the step time in ms; None if no finished step was seen."""
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    """Exit code of each failed rank, in the order of failure."""
    tails: Mapping[int, str] = field(default_factory=dict)
    """The end of each rank's output, by rank."""
    launcher_tail: str = ""
    """The end of the output of the job's first process."""
    host_oom_kills: int = 0
    """Number of processes that the kernel killed for lack of memory while the job ran."""

    @property
    def phase(self) -> Phase:
        """Return the phase in the last heartbeat, or `startup` if none was seen."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def step(self) -> int:
        """Return how many optimizer steps were finished at the last heartbeat."""
        return self.heartbeat.step if self.heartbeat else 0

    def ranks_by_failure(self) -> list[int]:
        """Return the ranks that left output: the failed ones in the order of failure, then the others."""
        failed = [rank for rank in self.exit_codes if rank in self.tails]
        return failed + [rank for rank in sorted(self.tails) if rank not in self.exit_codes]


def launcher_log(folder: TrialFolder) -> Path:
    """Return the path of the file to which the output of the job's first process goes."""
    return folder.log / "torchrun.log"


def rank_logs(folder: TrialFolder) -> dict[int, list[Path]]:
    """Return the paths of the output files of each rank; torchrun writes them to a folder named after the rank."""
    logs_by_rank: dict[int, list[Path]] = {}
    for path in sorted(folder.log.glob("*/attempt_0/*/std*.log")):
        logs_by_rank.setdefault(int(path.parent.name), []).append(path)
    return logs_by_rank


def with_files(evidence: JobEvidence, folder: TrialFolder, world_size: int) -> JobEvidence:
    """Return the evidence with what the ranks and torchrun wrote into the folder added.

    A missing or incomplete file is left out.
    """
    records = []
    for rank in range(world_size):
        with suppress(InputError):
            records.append(read_json(RankRecord, folder.rank_record(rank)))
    result, result_at_s, result_error = None, 0.0, ""
    try:
        result = read_json(TrialResult, folder.result)
        result_at_s = folder.result.stat().st_mtime
    except InputError as error:
        result_error = str(error) if folder.result.exists() else ""
    report = logs.tail(launcher_log(folder))
    return replace(
        evidence,
        result=result,
        result_at_s=result_at_s,
        result_error=result_error,
        records=tuple(records),
        exit_codes=failed_ranks(report),
        tails={rank: "".join(map(logs.tail, paths)) for rank, paths in rank_logs(folder).items()},
        launcher_tail=report,
    )


def as_single_rank(evidence: JobEvidence) -> JobEvidence:
    """Return the evidence of a command's job with the command as rank 0, since there is no torchrun above it."""
    exit_codes = {0: evidence.exit_code} if evidence.exit_code else {}
    return replace(evidence, exit_codes=exit_codes, tails={0: evidence.launcher_tail}, launcher_tail="")
