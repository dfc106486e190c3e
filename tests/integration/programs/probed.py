"""Probes the worst pipeline stage of each trial of a list: `python -m tests.integration.programs.probed CASES PEAKS`.

The peaks are in GiB, one per trial: the real program's account under fake tensors.
"""

import json
import sys
from pathlib import Path

from launchers.programs.megatron_core.probe import prepare, probe
from tuner.files import read_json
from tuner.trial.contract import TrialSpec


def main(cases: Path, peaks: Path) -> None:
    measured = []
    for spec in read_json(tuple[TrialSpec, ...], cases):
        prepare(spec.cluster)
        world = spec.cluster.world_size
        ranks = range(0, world, world // spec.layout.pp)
        measured.append(max(probe(spec.workload, spec.layout, world, rank)[0] for rank in ranks))
    peaks.write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
