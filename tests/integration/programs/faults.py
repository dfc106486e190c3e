"""A program that ends in the way that its spec's `program` names, and needs no Megatron.

It runs as a trial's program does: `torchrun -m tests.integration.programs.faults SPEC FOLDER`. The faults are real:
processes are killed, memory and disks are full, collectives of a Gloo group wait for a rank that never comes.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tuner.files import write_json
from tuner.trial.contract import (
    Failure,
    Heartbeat,
    Metrics,
    Outcome,
    Phase,
    RankRecord,
    TrialFolder,
    TrialResult,
)

if TYPE_CHECKING:  # most faults need no torch, which a cold rank would import for nothing
    from launchers.programs.harness.monitor import Monitor

RANK = int(os.environ["RANK"])
FOLDER = TrialFolder(Path(sys.argv[2]))
FLOOD_MIB = 1024
MIB = 1 << 20
METRICS = Metrics(
    step_times_ms=(99.0, 100.0, 101.0),
    step_time_ms=100.0,
    step_time_low_ms=99.0,
    step_time_high_ms=101.0,
    losses=(5.0,),
    grad_norms=(1.0,),
    tokens_per_s_per_gpu=1000.0,
    model_tflops_per_s_per_gpu=1.0,
    mfu=None,
    peak_allocated_gib=0.1,
    peak_reserved_gib=None,
)


def beat(phase: Phase, step: int) -> None:
    if RANK == 0:
        write_json(FOLDER.heartbeat, Heartbeat(phase=phase, step=step, time_s=time.time()))


def record(phase: Phase, step: int, kind: str = "", message: str = "") -> None:
    failure = Failure(kind=kind, message=message, traceback="", time_s=time.time()) if kind else None
    FOLDER.ranks.mkdir(exist_ok=True)
    write_json(
        FOLDER.rank_record(RANK), RankRecord(rank=RANK, host="here", phase=phase, step=step, failure=failure)
    )


def wait() -> NoReturn:
    while True:
        time.sleep(60)


@contextmanager
def trial() -> Iterator["Monitor"]:
    """Join a Gloo group, and record failures as the built-in program records them."""
    import torch.distributed as dist

    from launchers.programs.harness.failures import report_failure
    from launchers.programs.harness.monitor import Monitor

    monitor = Monitor(FOLDER, RANK, time.time())
    try:
        dist.init_process_group("gloo")
        yield monitor
    except Exception as error:
        report_failure(monitor, error)
        os._exit(1)


def completes() -> None:
    beat("build", 0)
    time.sleep(0.3)
    beat("measure", 3)
    record("teardown", 8)
    if RANK == 0:
        write_json(FOLDER.result, TrialResult(outcome=Outcome.COMPLETED, reason="measured", metrics=METRICS))


def exits(code: int) -> None:
    sys.exit(code if RANK == 1 else 0)


def meets_another() -> None:
    """Complete once a trial in another folder beside this one has begun."""
    beat("build", 0)
    while len([*FOLDER.path.parent.glob("*/heartbeat.json")]) < 2:
        time.sleep(0.05)
    completes()


def outlives_another() -> None:
    """Complete once a trial in another folder beside this one has left its result."""
    beat("build", 0)
    while not [*FOLDER.path.parent.glob("*/result.json")]:
        time.sleep(0.05)
    completes()


def completes_and_exits_3() -> None:
    completes()
    exits(3)


def is_refused() -> None:
    """Fail on rank 1 as Megatron's own checks do, before anything can record it."""
    beat("build", 0)
    while not FOLDER.heartbeat.exists():
        time.sleep(0.05)
    if RANK == 1:
        raise AssertionError("hidden_size must be a multiple of tp")
    wait()


def runs_out_of_memory(where: Phase) -> None:
    """Allocate too much for a trial's account on rank 1, while its peer waits in a collective."""
    import torch
    import torch.distributed as dist

    from launchers.programs.harness.memory import TensorAccount

    def allocate(phase: Phase) -> None:
        if RANK == 1 and phase == where:
            torch.empty(128 * MIB, dtype=torch.uint8)

    with trial() as monitor, TensorAccount(64 * MIB):
        monitor.enter("build")
        allocate("build")
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.Adam(model.parameters())
        dist.barrier()
        monitor.enter("warmup")
        monitor.enter_part("forward")
        output = model(torch.ones(8, 64))
        allocate("forward")
        monitor.enter_part("backward")
        output.register_hook(lambda _: allocate("backward"))
        output.sum().backward()
        monitor.enter_part("optimizer")
        optimizer.step()
        allocate("optimizer")
        dist.barrier()


def runs_out_of_host_memory() -> None:
    """Let the kernel refuse memory to rank 1, and record nothing."""
    import torch

    beat("forward", 2)
    if RANK == 1:
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 64 * MIB, resource.RLIM_INFINITY))
        torch.empty(1024 * MIB, dtype=torch.uint8)
    wait()


def is_killed() -> None:
    """Kill rank 1 in a step; its peer sees a closed connection, and records that as its own failure."""
    import torch.distributed as dist

    with trial() as monitor:
        monitor.enter("measure")
        dist.barrier()
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def is_killed_by_the_kernel() -> None:
    """Let rank 1 exceed its limit of processor time: the kernel sends SIGKILL, as it does for memory."""
    if RANK == 1:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit_s = int(usage.ru_utime + usage.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        while True:
            pass
    wait()


def crashes() -> None:
    if RANK == 1:
        ctypes.string_at(0)
    wait()


def kills_its_launcher() -> None:
    if RANK == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    wait()


def turns_nan() -> None:
    """Fail on every rank with a loss that is NaN, and record it."""
    import torch.distributed as dist

    from launchers.programs.harness.failures import NonFiniteLossError

    with trial() as monitor:
        monitor.enter("warmup")
        monitor.finish_step()
        dist.barrier()
        time.sleep(0.2 * RANK)
        raise NonFiniteLossError("loss nan, gradient norm nan in step 1")


def turns_nan_and_a_rank_will_not_end() -> None:
    """Leave a result and no record on rank 0; torchrun has to kill rank 1, which looks like a foreign kill."""
    if RANK == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        record("warmup", 1)
        wait()
    while not FOLDER.rank_record(1).exists():
        time.sleep(0.05)
    result = TrialResult(outcome=Outcome.NAN, reason="loss is nan at step 2", phase="warmup", rank=0)
    write_json(FOLDER.result, result)
    sys.exit(1)


def hangs() -> None:
    beat("measure", 4)
    wait()


def hangs_in_a_collective() -> None:
    """Wait on rank 0 in a collective that rank 1 never joins."""
    import torch.distributed as dist

    with trial() as monitor:
        monitor.enter("measure")
        monitor.finish_step()
        if RANK == 1:
            wait()
        dist.barrier()


def stalls() -> None:
    """Stop rank 1 after some quick steps; no rank ends or fails."""
    import torch.distributed as dist

    with trial() as monitor:
        monitor.enter("measure")
        while True:
            dist.barrier()
            monitor.finish_step()
            time.sleep(0.1)
            if RANK == 1 and monitor.step == 8:
                os.kill(os.getpid(), signal.SIGSTOP)


def never_starts() -> None:
    wait()


def beats_forever() -> None:
    for step in range(1, 6000):
        beat("measure", step)
        time.sleep(0.1)


def leaves_grandchildren() -> None:
    """Complete, and leave processes in sessions of their own that ignore SIGTERM and whose parents have ended."""
    code = (
        "import os, signal, time\n"
        "if os.fork(): time.sleep(0.5); os._exit(0)\n"
        "os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        child.wait()
    completes()


def truncates_its_result() -> None:
    completes()
    if RANK == 0:
        os.truncate(FOLDER.result, FOLDER.result.stat().st_size // 2)


def corrupts_its_result() -> None:
    completes()
    if RANK == 0:
        FOLDER.result.write_bytes(bytes(reversed(range(256))))


def floods() -> None:
    """Print more than a disk should hold, as fast as possible."""
    text = ("x" * 1023 + "\n") * 1024
    print("the first line", flush=True)
    for _ in range(FLOOD_MIB if RANK == 0 else 0):
        sys.stdout.write(text)
    print("the last line", flush=True)
    completes()


def fills_the_disk() -> None:
    """Fill the disk of the trial's folder, which has to be a small one."""
    import torch.distributed as dist

    with trial() as monitor:
        monitor.enter("measure")
        monitor.finish_step()
        dist.barrier()
        if RANK == 0:
            with (FOLDER.path / "checkpoint").open("wb", buffering=0) as file:
                for _ in range(256):
                    file.write(b"x" * MIB)
        dist.barrier()


def loses_its_rendezvous_port() -> None:
    """Let rank 0 listen on a port that is taken."""
    import torch.distributed as dist

    with trial(), socket.create_server(("127.0.0.1", 0)) as taken:
        if RANK == 0:
            dist.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True)  # type: ignore[attr-defined]
        dist.barrier()


PHASES: tuple[Phase, ...] = ("build", "forward", "backward", "optimizer")
FAULTS: Mapping[str, Callable[[], None]] = {
    **{
        fault.__name__: fault
        for fault in (
            completes,
            meets_another,
            outlives_another,
            completes_and_exits_3,
            is_refused,
            runs_out_of_host_memory,
            is_killed,
            is_killed_by_the_kernel,
            crashes,
            kills_its_launcher,
            turns_nan,
            turns_nan_and_a_rank_will_not_end,
            hangs,
            hangs_in_a_collective,
            stalls,
            never_starts,
            beats_forever,
            leaves_grandchildren,
            truncates_its_result,
            corrupts_its_result,
            floods,
            fills_the_disk,
            loses_its_rendezvous_port,
        )
    },
    **{f"exits_{code}": partial(exits, code) for code in (0, 1, 3, 255)},
    **{f"runs_out_of_memory_in_{phase}": partial(runs_out_of_memory, phase) for phase in PHASES},
}

if __name__ == "__main__":
    FAULTS[json.loads(Path(sys.argv[1]).read_text())["program"]]()
