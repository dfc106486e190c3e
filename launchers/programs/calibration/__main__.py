"""Measures how fast this machine is: `torchrun ... -m launchers.programs.calibration PLAN.json CALIBRATION.json`.

Every rank does the same work at the same time, as in training, so that ranks which share cores or links slow each other
down. Each piece of work is repeated in a batch that takes much longer than a time slice of the operating system's
scheduler or a tick of the clock, and the batch is timed. The slowest rank's time counts, and the median is taken over
several passes. The functions that do the work are those that training calls; on CPU they go through the replacements of
`harness.cpu` as well.
"""

import os
import sys
import time
import traceback
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from launchers.programs.calibration.collectives import collectives
from launchers.programs.calibration.points import PointTable, TimedPoint
from launchers.programs.calibration.work import MLP_OPERATIONS, copies, products, small_mlp
from launchers.programs.harness.cpu import enable_cpu
from tuner.files import read_json, write_json
from tuner.predict.calibration import Calibration, CalibrationPlan
from tuner.trial.contract import Heartbeat, TrialFolder

_TIMEOUT = timedelta(minutes=5)


def main(arguments: list[str]) -> None:
    """Take part in the measurement as one rank; rank 0 writes the calibration.

    `arguments` are the path of the plan and the path of the calibration.
    """
    plan = read_json(CalibrationPlan, Path(arguments[0]))
    enable_cpu()
    device = torch.device(plan.machine.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    if dist.get_rank() == 0:
        # All ranks run now, and whoever watches the machine may count what they take.
        write_json(
            TrialFolder(Path(arguments[1]).parent).heartbeat,
            Heartbeat(phase="measure", step=0, time_s=time.time()),
        )
    calibration = measure(plan, device)
    if dist.get_rank() == 0:
        write_json(Path(arguments[1]), calibration)
    dist.barrier()
    dist.destroy_process_group()


def measure(plan: CalibrationPlan, device: torch.device) -> Calibration:
    """Measure everything that `plan` names and return the calibration, which is the same on every rank."""
    host = PointTable((), [TimedPoint(partial(small_mlp, device), waits=False)])
    gemm = {precision: products(plan, precision, device) for precision in plan.precisions}
    copy = copies(plan, device)
    near, apart = collectives(plan, device)
    tables = (host, *gemm.values(), copy, *near.values(), *apart.values())
    points = dict.fromkeys(point for table in tables for point in table.points)  # each point once
    # Each pass reads every point once, so that a disturbance of a second spoils one reading of a point, not all.
    for _ in range(plan.passes):
        for point in points:
            point.read(plan.batch_s, device)
    return Calibration(
        machine=plan.machine,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        host_us=host.times.ms[0] / MLP_OPERATIONS * 1000,
        gemm={precision: table.times for precision, table in gemm.items()},
        copy=copy.times,
        collectives={kind: table.times for kind, table in near.items()},
        strided_collectives={kind: table.times for kind, table in apart.items()},
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a collective may be pending for ever, and its destructor would wait for it
