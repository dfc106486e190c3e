"""Starts the memory probe, which runs one rank of a trial on fake tensors and reports its peak memory.

The probe runs in a separate process, since it patches torch and cannot undo that.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launchers.processes import inherited_environment, python_path
from tuner.errors import MegatuneError
from tuner.files import read_json, write_json
from tuner.trial.contract import RankRecord, TrialSpec

PROGRAM = "launchers.programs.megatron_core.probe"
LIMIT_S = 1800
"""The time limit of a probe, in seconds. Assumed: the largest models take minutes."""


def probe(spec: TrialSpec, rank: int) -> RankRecord:
    """Return the record that one rank of a trial would write, with its peak memory, or the failure if it would fail.

    The call takes seconds to minutes.

    Raises:
        MegatuneError: if the process ended without a record, or took longer than LIMIT_S.
    """
    with tempfile.TemporaryDirectory(prefix="megatune-probe-") as folder:
        spec_path, record_path = Path(folder) / "spec.json", Path(folder) / "record.json"
        write_json(spec_path, spec)
        command = [sys.executable, "-P", "-m", PROGRAM, str(spec_path), str(rank), str(record_path)]
        try:
            done = subprocess.run(
                command,
                env=_environment(spec),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise MegatuneError(
                f"the probe of rank {rank} took longer than {LIMIT_S} s: the peak is the same with a smaller "
                "global_batch_size, as long as each stage of the pipeline is filled"
            ) from None
        if not record_path.exists():
            raise MegatuneError(
                f"the probe of rank {rank} ended with code {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return read_json(RankRecord, record_path)


def _environment(spec: TrialSpec) -> dict[str, str]:
    # For a CPU cluster, the rank must see no GPU, as in the trial. Fake tensors keep one core busy at most.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec.cluster.device == "cpu" else {}
    return (
        inherited_environment()
        | hidden
        | {"PYTHONPATH": os.pathsep.join(python_path()), "OMP_NUM_THREADS": "1"}
    )
