"""The script in docs/python.md does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWEEP = """
name: night
workload: {model: tiny-gpt, seq_length: 64, global_batch_size: 4, precision: fp32}
cluster: {name: cpu-4, gpus_per_node: 2}
knobs: {tp: [1, 2], micro_batch_size: [1, 2]}
budget: {trials: 2, min_gain: null, finalists: 0}
measurement: {min_steps: 5, max_steps: 5}
"""


def test_the_documented_script_plans_runs_and_exports_a_sweep(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)
    assert found is not None
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "script.py").write_text(found[1])
    ended = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "predicted_ms" in ended.stdout
    assert re.search(r"^0 tp\d .* completed$", ended.stdout, re.M), "the observer is told of trial 0"
    assert "Finished: the budget of trials is used." in ended.stdout
    assert "++model.tensor_model_parallel_size=" in ended.stdout
