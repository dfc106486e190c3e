"""A program that times steps for two seconds, idle or busy as its spec's `program` says, and needs no Megatron.

It runs as `torchrun -m tests.integration.programs.measures SPEC FOLDER`.
"""

import os
import sys
import time
from pathlib import Path

from tests.trials import metrics_of
from tuner.files import read_json, write_json, write_text
from tuner.trial.contract import Heartbeat, Outcome, Phase, TrialFolder, TrialResult, TrialSpec

TIMED_S = 2.0
RANK = int(os.environ.get("RANK", "0"))


def main(spec: TrialSpec, folder: TrialFolder) -> None:
    enter("build", 0, folder)
    time.sleep(0.3)
    enter("measure", 3, folder)
    end_s, used_s = time.monotonic() + TIMED_S, time.process_time()
    while time.monotonic() < end_s:
        if spec.program == "idles":
            time.sleep(0.01)
    write_text(folder.path / f"used{RANK}.txt", str(time.process_time() - used_s))
    enter("teardown", 6, folder)
    if RANK == 0:
        result = TrialResult(outcome=Outcome.COMPLETED, reason="measured", metrics=metrics_of(100.0))
        write_json(folder.result, result)


def enter(phase: Phase, step: int, folder: TrialFolder) -> None:
    if RANK == 0:
        write_json(folder.heartbeat, Heartbeat(phase=phase, step=step, time_s=time.time()))


if __name__ == "__main__":
    main(read_json(TrialSpec, Path(sys.argv[1])), TrialFolder(Path(sys.argv[2])))
