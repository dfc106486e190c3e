"""The faults that trials are tested with: the outcome that each must get, and how soon it must be over."""

from dataclasses import dataclass, replace

from tests.trials import CLUSTER, spec_of
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import read_json
from tuner.trial.contract import Limits, Outcome, TrialFolder, TrialResult, TrialSpec

PROGRAM = "tests.integration.programs.faults"
CPU = replace(CLUSTER, device="cpu", gpus_per_node=2, nvlink_domain_gpus=2)
LIMITS = Limits(startup_s=50.0, step_s=50.0, trial_s=60.0)


class Programs(dict[str, str]):
    """Maps every program's name to the fault-injecting program, which ends as the name says."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return PROGRAM


@dataclass(frozen=True, slots=True)
class Fault:
    """A way in which a trial ends, and how it must be reported."""

    program: str
    """The name of a function of the fault-injecting program."""
    outcome: Outcome
    words: str
    """Text that the reason must contain."""
    rank: int | None = None
    limits: Limits = LIMITS
    within_s: float = 25.0
    """Time from the launcher's start to the end of the last process: the fault's own, and a slow machine's start."""
    needs_small_disk: bool = False
    """Whether the trial's folder must be a small disk of its own (tests/disks.py)."""

    def spec(self) -> TrialSpec:
        """Return a trial of two ranks on this machine's CPU that ends in this way."""
        return spec_for(self.program, self.limits)


def spec_for(program: str, limits: Limits = LIMITS) -> TrialSpec:
    """Return a trial of two ranks on this machine's CPU that runs a function of the program."""
    return replace(spec_of(0, Layout(), cluster=CPU), program=program, limits=limits)


_KILLED, _RANK_1 = "which megatune did not send", "rank 1 ended with exit code"
FAULTS = (
    Fault("exits_1", Outcome.INFRASTRUCTURE, f"{_RANK_1} 1", rank=1),
    Fault("exits_3", Outcome.INFRASTRUCTURE, f"{_RANK_1} 3", rank=1),
    Fault("exits_255", Outcome.INFRASTRUCTURE, f"{_RANK_1} 255", rank=1),
    Fault("exits_0", Outcome.INFRASTRUCTURE, "the program left no result"),
    Fault("completes_and_exits_3", Outcome.INFRASTRUCTURE, f"{_RANK_1} 3", rank=1),
    Fault("is_refused", Outcome.INVALID, "in build after 0 steps: hidden_size must be", rank=1),
    Fault("runs_out_of_memory_in_build", Outcome.OOM, "in build after 0 steps: CPU out of memory", rank=1),
    Fault(
        "runs_out_of_memory_in_forward", Outcome.OOM, "in forward after 0 steps: CPU out of memory", rank=1
    ),
    Fault("runs_out_of_memory_in_backward", Outcome.OOM, "in backward after 0 steps: CPU out of", rank=1),
    Fault("runs_out_of_memory_in_optimizer", Outcome.OOM, "in optimizer after 0 steps: CPU out of", rank=1),
    Fault("runs_out_of_host_memory", Outcome.OOM, "DefaultCPUAllocator", rank=1),
    Fault("is_killed", Outcome.INFRASTRUCTURE, f"rank 1 died in measure of SIGKILL, {_KILLED}", rank=1),
    Fault("is_killed_by_the_kernel", Outcome.INFRASTRUCTURE, f"SIGKILL, {_KILLED}", rank=1),
    Fault("crashes", Outcome.INFRASTRUCTURE, f"rank 1 died in startup of SIGSEGV, {_KILLED}", rank=1),
    Fault(
        "kills_its_launcher", Outcome.INFRASTRUCTURE, f"the launcher died in startup of SIGKILL, {_KILLED}"
    ),
    Fault("turns_nan", Outcome.NAN, "NonFiniteLossError in warmup after 1 steps: loss nan", rank=0),
    Fault(  # torchrun gives the other rank 30 s before it kills it, whatever is set
        "turns_nan_and_a_rank_will_not_end", Outcome.NAN, "loss is nan at step 2", rank=0, within_s=50.0
    ),
    Fault(
        "hangs_in_a_collective",
        Outcome.HANG,
        "no heartbeat for 2 s (limits.step_s) after step 1",
        limits=replace(LIMITS, step_s=2.0),
    ),
    Fault(
        "stalls",
        Outcome.HANG,
        "no heartbeat for 30 s (20 times the slowest step so far, at least 30 s) after step 8",
        within_s=60.0,
        limits=Limits(),
    ),
    Fault(
        "never_starts",
        Outcome.HANG,
        "no optimizer step within 6 s (limits.startup_s)",
        limits=replace(LIMITS, startup_s=6.0),
    ),
    Fault(
        "beats_forever",
        Outcome.TIMEOUT,
        "not finished within 6 s (limits.trial_s)",
        limits=replace(LIMITS, trial_s=6.0),
    ),
    Fault("leaves_grandchildren", Outcome.COMPLETED, "measured"),
    Fault("truncates_its_result", Outcome.INFRASTRUCTURE, "result.json: is not JSON"),
    Fault("corrupts_its_result", Outcome.INFRASTRUCTURE, "result.json: "),
    Fault("floods", Outcome.COMPLETED, "measured", within_s=40.0),
    Fault(
        "fills_the_disk",
        Outcome.INFRASTRUCTURE,
        "no space left in measure on the disk of",
        needs_small_disk=True,
    ),
    Fault("loses_its_rendezvous_port", Outcome.COMMUNICATION, "EADDRINUSE", rank=0),
)


def wrong(fault: Fault, result: TrialResult) -> str:
    """Return the part of a trial's result that does not match the fault; empty if all of it does."""
    if result.outcome is not fault.outcome:
        return f"{result.outcome}: {result.reason}"
    if result.rank != fault.rank:
        return f"rank {result.rank}, not {fault.rank}: {result.reason}"
    return "" if fault.words in result.reason else result.reason


def lost(folder: TrialFolder, result: TrialResult) -> list[str]:
    """Return the names of the files that a trial's folder lacks."""
    missing = [path.name for path in (folder.spec, folder.plan) if not path.exists()]
    try:
        if read_json(TrialResult, folder.result) != result:
            missing.append("result.json is another")
    except InputError:
        missing.append("result.json")
    logs = {f"{path.parent.name}/{path.name}" for path in folder.log.glob("*/attempt_0/*/*.log")}
    missing += sorted({f"{rank}/{name}.log" for rank in (0, 1) for name in ("stdout", "stderr")} - logs)
    named = result.reason.rpartition(" (log: ")[2]
    if named != result.reason and not (folder.path / named.removesuffix(")")).is_file():
        missing.append(named)
    return missing
