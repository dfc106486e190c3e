"""The rules and the installed Megatron agree on random layouts. More of them: MEGATUNE_ORACLE_DRAWS=2000."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DRAWS = int(os.environ.get("MEGATUNE_ORACLE_DRAWS", "200"))
SEED = int(os.environ.get("MEGATUNE_ORACLE_SEED", "20260"))
WORKERS = 2


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the oracle found. It runs in processes of its own: it turns a process into a CPU-only fake world
    for good.
    """
    print(f"MEGATUNE_ORACLE_SEED={SEED} MEGATUNE_ORACLE_DRAWS={DRAWS}")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.oracle",
        "--draws",
        str(DRAWS),
        "--seed",
        str(SEED),
    ]
    processes = [
        subprocess.Popen(
            [*command, "--workers", str(WORKERS), "--worker", str(worker)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for worker in range(WORKERS)
    ]
    merged: dict[str, Any] = {"disagreements": [], "counts": {}, "broken_alone": {}}
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        part = json.loads(output)
        merged["disagreements"] += part["disagreements"]
        for key in ("counts", "broken_alone"):
            for name, number in part[key].items():
                merged[key][name] = merged[key].get(name, 0) + number
    return merged


@pytest.mark.timeout(60 + 10 * DRAWS)
def test_megatron_takes_exactly_the_layouts_that_the_rules_call_legal(report: dict[str, Any]) -> None:
    assert not report["disagreements"], json.dumps(report["disagreements"][:5], indent=2)


def test_the_draws_meet_both_verdicts_and_many_rules(report: dict[str, Any]) -> None:
    counts = report["counts"]
    assert counts["accepted"] >= DRAWS // 5
    assert counts["valid"] >= DRAWS // 10
    assert sum(number for name, number in counts.items() if name.startswith("refused")) >= DRAWS // 10
    assert len(report["broken_alone"]) >= min(10, DRAWS // 10)
