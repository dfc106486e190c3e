"""A program that ends in the way its spec's `program` names, and needs no Megatron.

Run as `torchrun -m tests.integration.programs.endings SPEC FOLDER`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.trials import metrics_of
from tuner.files import write_json
from tuner.trial import Failure, Heartbeat, Outcome, Phase, RankRecord, TrialFolder, TrialResult

RANK = int(os.environ["RANK"])
FOLDER = TrialFolder(Path(sys.argv[2]))


def beat(phase: Phase, step: int) -> None:
    if RANK == 0:
        write_json(FOLDER.heartbeat, Heartbeat(phase=phase, step=step, time_s=time.time()))


def record(phase: Phase, step: int, kind: str = "", message: str = "") -> None:
    failure = Failure(kind=kind, message=message, traceback="", time_s=time.time()) if kind else None
    FOLDER.ranks.mkdir(exist_ok=True)
    write_json(
        FOLDER.rank_record(RANK), RankRecord(rank=RANK, host="here", phase=phase, step=step, failure=failure)
    )


def completes() -> None:
    beat("build", 0)
    time.sleep(0.3)
    beat("measure", 3)
    record("teardown", 8)
    if RANK == 0:
        result = TrialResult(outcome=Outcome.COMPLETED, reason="measured", metrics=metrics_of(100.0))
        write_json(FOLDER.result, result)


def completes_and_exits_3() -> None:
    completes()
    sys.exit(3 if RANK == 1 else 0)


def runs_out_of_memory() -> None:
    beat("warmup", 1)
    if RANK == 0:
        time.sleep(60)
    record("warmup", 1, "torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.")
    sys.exit(1)


def is_refused() -> None:
    """As Megatron's own checks, and before anything could record it."""
    beat("build", 0)
    if RANK == 1:
        raise AssertionError("hidden_size must be a multiple of tp")
    time.sleep(60)


def turns_nan() -> None:
    if RANK == 0:
        result = TrialResult(outcome=Outcome.NAN, reason="loss is nan at step 2", phase="warmup", rank=0)
        write_json(FOLDER.result, result)
        sys.exit(1)
    time.sleep(60)


def exits_3() -> None:
    sys.exit(3 if RANK == 1 else 0)


def is_killed() -> None:
    """Rank 1 is killed; rank 0 notices, and records that as its own failure."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    record("forward", 2, "torch.distributed.DistBackendError", "gloo: Connection closed by peer [127.0.0.1]")
    time.sleep(60)


def crashes() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def hangs() -> None:
    beat("measure", 4)
    time.sleep(60)


def never_starts() -> None:
    time.sleep(60)


def beats_forever() -> None:
    for step in range(1, 600):
        beat("measure", step)
        time.sleep(0.1)


def leaves_a_grandchild() -> None:
    """A grandchild in a session of its own that does not mind SIGTERM, and whose parent is gone."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(99)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    completes()


def writes_garbage() -> None:
    if RANK == 0:
        FOLDER.result.write_text('{"outcome": "comple')


def floods() -> None:
    line = "x" * 1023 + "\n"
    print("the first line", flush=True)
    for _ in range(200 if RANK == 0 else 0):
        sys.stdout.write(line * 1024)
        time.sleep(0.005)
    print("the last line", flush=True)
    completes()


ENDINGS: Mapping[str, Callable[[], None]] = {
    ending.__name__: ending
    for ending in (
        completes,
        completes_and_exits_3,
        runs_out_of_memory,
        is_refused,
        turns_nan,
        exits_3,
        is_killed,
        crashes,
        hangs,
        never_starts,
        beats_forever,
        leaves_a_grandchild,
        writes_garbage,
        floods,
    )
}

if __name__ == "__main__":
    ENDINGS[json.loads(Path(sys.argv[1]).read_text())["program"]]()
