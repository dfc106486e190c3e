"""What is left of a job after its last process has ended: the evidence that its outcome is decided from."""

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
    """What a launcher saw of a job, and what the job left in its folder."""

    limits: Limits
    folder: Path = Path()
    """The trial's folder."""
    exit_code: int | None
    """Exit code of the job's first process, negative for a signal; None if it could not be reaped."""
    ending: Ending | None = None
    """Why the launcher ended the job; None if it ended by itself."""
    ended_at_s: float = float("inf")
    """When the launcher ended the job, in seconds since the epoch; later failures are consequences of this end."""
    silence_s: float = float("inf")
    """How long the job was allowed to be silent when it was ended: limits.step_s, or less if its steps were known."""
    survivors: tuple[int, ...] = ()
    """Ids of the processes that even SIGKILL did not end."""
    free_bytes: float = float("inf")
    """Free space on the folder's disk at the end."""
    held_gpus: tuple[str, ...] = ()
    """One line for each GPU that is fuller than before the job."""
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
    """A lower bound of the step time; None where no step was seen."""
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    """Exit code of each failed rank, in the order of failure."""
    tails: Mapping[int, str] = field(default_factory=dict)
    """The end of each rank's output."""
    launcher_tail: str = ""
    """The end of the output of the job's first process."""
    host_oom_kills: int = 0
    """How many processes the kernel killed for memory while the job ran."""

    @property
    def phase(self) -> Phase:
        """The phase of the last heartbeat."""
        return self.heartbeat.phase if self.heartbeat else "startup"

    @property
    def step(self) -> int:
        """How many optimizer steps were finished at the last heartbeat."""
        return self.heartbeat.step if self.heartbeat else 0

    def ranks_by_failure(self) -> list[int]:
        """Return the ranks that left output: the failed ones in the order of failure, then the others."""
        failed = [rank for rank in self.exit_codes if rank in self.tails]
        return failed + [rank for rank in sorted(self.tails) if rank not in self.exit_codes]


def launcher_log(folder: TrialFolder) -> Path:
    """Return the file that takes the output of the job's first process."""
    return folder.log / "torchrun.log"


def rank_logs(folder: TrialFolder) -> dict[int, list[Path]]:
    """Return the output files by rank: in torchrun's own folder, there is a folder named after each rank."""
    logs_by_rank: dict[int, list[Path]] = {}
    for path in sorted(folder.log.glob("*/attempt_0/*/std*.log")):
        logs_by_rank.setdefault(int(path.parent.name), []).append(path)
    return logs_by_rank


def with_files(evidence: JobEvidence, folder: TrialFolder, world_size: int) -> JobEvidence:
    """Add what the ranks and torchrun wrote into the folder; a torn or missing file is left out."""
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
    """Return a command's evidence: the command counts as rank 0, since we start no torchrun above it."""
    exit_codes = {0: evidence.exit_code} if evidence.exit_code else {}
    return replace(evidence, exit_codes=exit_codes, tails={0: evidence.launcher_tail}, launcher_tail="")
