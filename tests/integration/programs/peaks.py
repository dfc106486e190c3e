"""Trains each workload and layout of a list for two steps in one job, and writes every rank's peak of tensors.

It runs as `torchrun ... -m tests.integration.programs.peaks CASES.json PEAKS.json`; peaks are in bytes, [case][rank].
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launchers.programs.harness.cpu import enable_cpu
from launchers.programs.harness.memory import TensorAccount
from launchers.programs.megatron_core.train import TrainingJob
from tuner.files import read_json
from tuner.trial.contract import TrialSpec


def peak_bytes(spec: TrialSpec) -> int:
    account = TensorAccount(float("inf"))
    with account:
        job = TrainingJob(spec.workload, spec.layout, spec.seed, torch.device("cpu"))
        for _ in range(2):
            job.step()
    job.close()
    return account.peak_bytes


def main(cases: Path, peaks: Path) -> None:
    enable_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = []
    for spec in read_json(tuple[TrialSpec, ...], cases):
        of_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(of_ranks, peak_bytes(spec))
        measured.append(of_ranks)
    if dist.get_rank() == 0:
        peaks.write_text(json.dumps(measured))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
