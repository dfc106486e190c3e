"""A row that is said to need no less memory than another allocates no less on every pipeline stage of a real trial."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from search_spaces.loader import load_cluster, load_model
from tuner.core.layout import KNOBS, Layout
from tuner.core.workload import Workload
from tuner.files import to_data, write_json
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.trial.contract import TrialSpec

ROOT = Path(__file__).parents[2]
CLUSTER = load_cluster("cpu-4")
WORKLOAD = Workload(model=load_model("tiny-gpt"), seq_length=64, global_batch_size=8, precision="fp32")
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
LAYOUTS = [
    Layout(pp=pp, micro_batch_size=micro, **recompute)
    for pp, micro, recompute in product((1, 2), (1, 2), RECOMPUTE)
]


def _peaks_gib(folder: Path) -> list[float]:
    specs = [
        TrialSpec(sweep="peaks", number=n, workload=WORKLOAD, cluster=CLUSTER, layout=layout)
        for n, layout in enumerate(LAYOUTS)
    ]
    write_json(folder / "cases.json", [to_data(spec) for spec in specs])
    files = (str(folder / "cases.json"), str(folder / "peaks.json"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.programs.probed", *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    peaks: list[float] = json.loads((folder / "peaks.json").read_text())
    return peaks


def test_a_row_that_is_said_to_need_no_less_allocates_no_less(tmp_path: Path) -> None:
    peaks = _peaks_gib(tmp_path)
    table = pd.DataFrame([{knob: getattr(layout, knob) for knob in KNOBS} for layout in LAYOUTS])
    pairs, merged, less = 0, 0, []
    for row, layout in enumerate(LAYOUTS):
        for other in np.flatnonzero(needs_at_least_as_much_memory(table, layout, WORKLOAD, CLUSTER)):
            pairs += int(other) != row
            merged += LAYOUTS[other].pp < layout.pp
            if peaks[other] < peaks[row]:
                less.append(
                    f"{LAYOUTS[other].label()} {peaks[other]}, yet {layout.label()} measured {peaks[row]}"
                )
    assert not less, "\n".join(less)
    assert pairs > merged > 0
