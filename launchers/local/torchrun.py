"""Runs trials on this machine, under torchrun."""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from launchers.processes import (
    MARKER,
    STARTED_AT,
    Job,
    RunningJob,
    end_marked,
    inherited_environment,
    python_path,
)
from launchers.watch import gpus, logs
from launchers.watch.classify import Evidence, Verdict, classify, failed_ranks
from launchers.watch.limits import Clock, Ending
from launchers.watch.telemetry import Sample, Sampler, summarise, suspicions
from tuner.core.environment import cuda_environment, recorded_environment
from tuner.core.layout import KNOBS, data_parallel_size, num_microbatches
from tuner.errors import InputError, did_you_mean
from tuner.files import read_json, to_data, write_json, write_text
from tuner.frameworks.megatron_bridge.override import bridge_words
from tuner.frameworks.megatron_bridge.recipe_file import recorded
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.frameworks.megatron_lm.trial_command import replaced
from tuner.trial.contract import Heartbeat, Outcome, RankRecord, TrialFolder, TrialResult, TrialSpec
from tuner.trial.launcher import LaunchPlan
from tuner.trial.program import BridgeRecipe, Command, MegatronLm, fill

PROGRAMS: Mapping[str, str] = {"megatron_core": "launchers.programs.megatron_core"}
"""The module of each program that a spec may name."""

BRIDGE = "launchers.programs.megatron_bridge"
"""The module that runs a recipe of Megatron Bridge."""

COMMAND = "launchers.programs.command"
"""The module that runs any other program."""

Start = Callable[[tuple[str, ...], Mapping[str, str], Path, Path], RunningJob]
"""Starts a command with an environment in a folder, its output appended to a file; raises OSError."""

_POLL_S = 0.1
_LOG_LIMIT_BYTES = 64 << 20
_RESERVE = ".reserve"
"""A file that stands in the folder while the job runs: removing it makes room for the result on a full disk."""
_RESERVE_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchrunLauncher:
    """Runs every trial as one torchrun job on this machine."""

    programs: Mapping[str, str] = field(default_factory=lambda: PROGRAMS)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """CPU cores that the ranks share."""
    grace_s: float = 10.0
    """Between SIGTERM and SIGKILL."""
    start: Start = Job
    """Cold, or `Preload.start`, which forks."""

    def plan(self, spec: TrialSpec, folder: TrialFolder) -> LaunchPlan:
        """See Launcher. The port is the kernel's choice at the start, so two sweeps cannot collide on it."""
        cluster = spec.cluster
        if cluster.nodes > 1:
            raise InputError(
                f"cluster '{cluster.name}': nodes = {cluster.nodes}, but the torchrun launcher starts jobs "
                "on this machine only: set cluster.nodes to 1; `megatune plan` and `explain` work for any cluster"
            )
        folder = TrialFolder(folder.path.absolute())
        if isinstance(spec.program, BridgeRecipe):
            spec = replace(spec, program=recorded(spec.program))
        return LaunchPlan(
            folder=folder.path,
            world_size=cluster.world_size,
            argv=self._argv(spec, folder),
            env=self._environment(spec, folder),
            files={folder.spec.name: json.dumps(to_data(spec), indent=2) + "\n"},
            limits=spec.limits,
            gpus=cluster.world_size if cluster.device == "cuda" else 0,
        )

    def _argv(self, spec: TrialSpec, folder: TrialFolder) -> tuple[str, ...]:
        """The program's ranks under torchrun; a command by itself, since what it starts is its own affair."""
        files = (str(folder.spec), str(folder.path))
        if isinstance(spec.program, Command):
            return (sys.executable, "-m", COMMAND, *files, *filled_command(spec, folder))
        if isinstance(spec.program, MegatronLm):
            # Its output is what is measured, so that nothing of it goes into the ranks' files.
            torchrun = (*_torchrun(spec, folder), "--redirects=0")
            steps = spec.measurement.warmup_steps + spec.measurement.max_steps
            words = replaced(spec.program.megatron_lm, spec.layout, spec.workload, steps)
            return (sys.executable, "-m", COMMAND, *files, *torchrun, *words)
        if isinstance(spec.program, BridgeRecipe):
            return (*_torchrun(spec, folder), "-m", BRIDGE, *files)
        if spec.program not in self.programs:
            known = ", ".join(sorted(self.programs))
            raise InputError(
                f"key 'program': unknown program '{spec.program}'{did_you_mean(spec.program, self.programs)}"
                f"; known: {known}"
            )
        return (*_torchrun(spec, folder), "-m", self.programs[spec.program], *files)

    def run(
        self,
        plan: LaunchPlan,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> TrialResult:
        """See Launcher."""
        folder, started_s = TrialFolder(plan.folder), time.monotonic()
        try:
            evidence, samples = self._run(plan, folder, stop, on_heartbeat)
            result = _result(evidence, classify(evidence), folder)
            result = _with_telemetry(result, samples, plan.world_size, self.cores)
        except OSError as error:
            # The disk is full, the folder gone, or no process can be started: the machine's fault.
            reason = f"the trial cannot be run in {folder.path}: {error}"
            result = TrialResult(outcome=Outcome.INFRASTRUCTURE, reason=reason)
        result = replace(
            result,
            durations=replace(result.durations, total_s=time.monotonic() - started_s),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            write_json(folder.result, result)
        except OSError as error:
            if result.outcome is not Outcome.COMPLETED:  # of a completed trial the program's own file stands
                reason = f"the result cannot be written in {folder.path}: {error}"
                result = TrialResult(
                    outcome=Outcome.INFRASTRUCTURE,
                    reason=reason,
                    durations=result.durations,
                    finished_at=result.finished_at,
                )
        return result

    def _environment(self, spec: TrialSpec, folder: TrialFolder) -> dict[str, str]:
        cluster = spec.cluster
        on_cpu = cluster.device == "cpu"
        env = {
            MARKER: str(folder.path),
            "PYTHONPATH": os.pathsep.join(python_path()),
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": str(max(1, self.cores // cluster.world_size) if on_cpu else 1),
            "GLOO_SOCKET_IFNAME": "lo",
            # How long torchrun waits for its ranks when it is told to end; once one failed, it is 30 s whatever is set.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(self.grace_s)),
        }
        return (
            env
            if on_cpu
            else env | cuda_environment(spec.layout, cluster, complete=isinstance(spec.program, BridgeRecipe))
        )

    def _run(
        self,
        plan: LaunchPlan,
        folder: TrialFolder,
        stop: threading.Event,
        on_heartbeat: Callable[[Heartbeat], None] | None,
    ) -> tuple[Evidence, tuple[Sample, ...]]:
        if left := end_marked(plan.env[MARKER], self.grace_s):
            return Evidence(limits=plan.limits, folder=folder.path, exit_code=None, survivors=left), ()
        _set_aside(folder)
        folder.log.mkdir(parents=True)
        for name, text in plan.files.items():
            write_text(folder.path / name, text)
        inherited = recorded_environment(inherited_environment())
        write_json(folder.plan, {**plan.to_data(), "inherited": inherited})
        kills_before, gpus_before = _host_oom_kills(), gpus.gpus_in_use(plan.gpus)
        watch = _Watch(folder, Clock(plan.limits, time.monotonic()), on_heartbeat)
        environment = {**inherited_environment(), **plan.env, STARTED_AT: repr(time.time())}
        (folder.path / _RESERVE).write_bytes(os.urandom(_RESERVE_BYTES))
        job = self.start(plan.argv, environment, folder.path, _output(folder))
        sampler = Sampler(folder, plan.gpus, plan.limits.trial_s, lambda: watch.clock.phase)
        try:
            sampler.start()
            ending = watch.until_end(job, stop)
            ended_at_s = time.time() if ending else math.inf
            silence_s = watch.clock.silence_s
            slower_than_ms = watch.clock.slower_than_ms(time.monotonic())
        finally:
            samples = sampler.end()
            survivors = job.end(self.grace_s)
            free_bytes = shutil.disk_usage(folder.path).free
            (folder.path / _RESERVE).unlink(missing_ok=True)
            watch.close_gaps()
        evidence = Evidence(
            limits=plan.limits,
            folder=folder.path,
            exit_code=job.exit_code,
            ending=ending,
            ended_at_s=ended_at_s,
            silence_s=silence_s,
            free_bytes=free_bytes,
            survivors=survivors,
            held_gpus=gpus.wait_for_release(gpus_before),
            heartbeat=watch.clock.heartbeat,
            slower_than_ms=slower_than_ms,
            host_oom_kills=_host_oom_kills() - kills_before,
        )
        evidence = _with_files(evidence, folder, plan.world_size)
        return (_of_one_rank(evidence) if COMMAND in plan.argv else evidence), samples


@dataclass(slots=True)
class _Watch:
    """Looks after a running job: its heartbeats, its limits, and the size of its output."""

    folder: TrialFolder
    clock: Clock
    on_heartbeat: Callable[[Heartbeat], None] | None
    cut: dict[Path, bytes] = field(default_factory=dict)

    def until_end(self, job: RunningJob, stop: threading.Event) -> Ending | None:
        """Block until the job ends by itself (None), or there is a reason to end it."""
        while not job.ended():
            self.look()
            if ending := self.clock.passed(time.monotonic()):
                return ending
            self.cut.update(logs.bound(self.folder.log, _LOG_LIMIT_BYTES))
            if stop.wait(_POLL_S):
                return "stop"
        self.look()
        return None

    def look(self) -> None:
        """Take in the newest heartbeat."""
        with suppress(InputError):
            beat = read_json(Heartbeat, self.folder.heartbeat)
            if self.clock.beat(beat, time.monotonic()) and self.on_heartbeat:
                self.on_heartbeat(beat)

    def close_gaps(self) -> None:
        """Make the cut files plain again, now that nobody writes them; what was written last may be too much."""
        self.cut.update(logs.bound(self.folder.log, _LOG_LIMIT_BYTES))
        for path, earlier in self.cut.items():
            logs.close_gap(path, earlier)


def _torchrun(spec: TrialSpec, folder: TrialFolder) -> tuple[str, ...]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
    torchrun += [f"--nproc-per-node={spec.cluster.world_size}", "--max-restarts=0"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=trial"]
    torchrun += ["--local-addr=127.0.0.1", f"--log-dir={folder.log}", "--redirects=3"]
    return tuple(torchrun)


def filled_command(spec: TrialSpec, folder: TrialFolder) -> tuple[str, ...]:
    """The words of a spec's command, its placeholders filled in.

    Raises:
        TypeError: if the spec's program is no command.
    """
    if not isinstance(spec.program, Command):
        raise TypeError(f"program '{spec.program}' is no command")
    workload, cluster, layout = spec.workload, spec.cluster, spec.layout
    dp = data_parallel_size(cluster.world_size, layout.tp, layout.pp, layout.cp)
    values = {
        **{knob: str(getattr(layout, knob)) for knob in KNOBS},
        "spec": str(folder.spec),
        "folder": str(folder.path),
        "seed": str(spec.seed),
        "steps": str(spec.measurement.warmup_steps + spec.measurement.max_steps),
        "nodes": str(cluster.nodes),
        "gpus_per_node": str(cluster.gpus_per_node),
        "world_size": str(cluster.world_size),
        "dp": str(dp),
        "num_microbatches": str(num_microbatches(workload.global_batch_size, layout.micro_batch_size, dp)),
        "seq_length": str(workload.seq_length),
        "global_batch_size": str(workload.global_batch_size),
    }
    arguments = [word for flag, words in megatron_lm_arguments(layout).items() for word in (flag, *words)]
    return fill(spec.program.command, values, {"megatron_lm": arguments, "bridge": bridge_words(spec)})


def _output(folder: TrialFolder) -> Path:
    return folder.log / "torchrun.log"


def _rank_logs(folder: TrialFolder) -> dict[int, list[Path]]:
    """The output files of each rank: torchrun names a folder after the rank, below one of its own."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.log.glob("*/attempt_0/*/std*.log")):
        found.setdefault(int(path.parent.name), []).append(path)
    return found


def _set_aside(folder: TrialFolder) -> None:
    """Move what an earlier attempt left out of the way; the result first: it says that the trial is done."""
    left = (folder.result, folder.heartbeat, folder.ranks, folder.log, folder.plan, folder.telemetry)
    stale = [path for path in left if path.exists()]
    if not stale:
        return
    attempt = 1
    while folder.set_aside(attempt).exists():
        attempt += 1
    folder.set_aside(attempt).mkdir()
    for path in stale:
        path.rename(folder.set_aside(attempt) / path.name)


def _host_oom_kills() -> int:
    """Processes that this kernel, or our cgroup, has killed for memory so far; 0 where neither tells."""
    kills = 0
    for counters in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        with suppress(OSError):
            lines = (line.split() for line in counters.read_text(encoding="ascii").splitlines())
            kills += sum(int(line[1]) for line in lines if line[0] == "oom_kill")
    return kills


def _with_files(evidence: Evidence, folder: TrialFolder, world_size: int) -> Evidence:
    """Add what the ranks and torchrun wrote; what is torn or missing is left out."""
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
    report = logs.tail(_output(folder))
    return replace(
        evidence,
        result=result,
        result_at_s=result_at_s,
        result_error=result_error,
        records=tuple(records),
        exit_codes=failed_ranks(report),
        tails={rank: "".join(map(logs.tail, paths)) for rank, paths in _rank_logs(folder).items()},
        launcher_tail=report,
    )


def _of_one_rank(evidence: Evidence) -> Evidence:
    """A command's evidence: no torchrun of ours stands over it, and what it printed is what a rank would have."""
    codes = {0: evidence.exit_code} if evidence.exit_code else {}
    return replace(evidence, exit_codes=codes, tails={0: evidence.launcher_tail}, launcher_tail="")


def _with_telemetry(
    result: TrialResult, samples: Sequence[Sample], world_size: int, cores: int
) -> TrialResult:
    """Add what the machine did meanwhile, and whether that disturbed it."""
    metrics = result.metrics
    telemetry = summarise(samples, metrics.tokens_per_s_per_gpu * world_size if metrics else None)
    if telemetry is None:
        return result
    return replace(result, telemetry=telemetry, suspicions=suspicions(telemetry, cores))


def _result(evidence: Evidence, verdict: Verdict, folder: TrialFolder) -> TrialResult:
    """What the program measured, under our verdict on it."""
    told = evidence.result
    if told and told.outcome is verdict.outcome and verdict.outcome in {Outcome.COMPLETED, Outcome.TOO_SLOW}:
        return told
    reason = verdict.reason
    if evidence.exit_code != 0:
        rank_logs = _rank_logs(folder).get(-1 if verdict.rank is None else verdict.rank, [])
        log = next((path for path in rank_logs if path.name == "stderr.log"), _output(folder))
        reason += f" (log: {log.relative_to(folder.path)})"
    return replace(
        evidence.result or TrialResult(outcome=Outcome.INFRASTRUCTURE, reason=""),
        outcome=verdict.outcome,
        reason=reason,
        phase=verdict.phase,
        rank=verdict.rank,
        metrics=None,
        slower_than_ms=evidence.slower_than_ms if verdict.outcome is Outcome.TIMEOUT else None,
        ranks=evidence.records or (evidence.result.ranks if evidence.result else ()),
    )
