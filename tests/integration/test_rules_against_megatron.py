"""The rules and the installed Megatron agree on random layouts; MEGATUNE_ORACLE_DRAWS=2000 draws more of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DRAWS = int(os.environ.get("MEGATUNE_ORACLE_DRAWS", "60"))
SEED = int(os.environ.get("MEGATUNE_ORACLE_SEED", "20260"))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The oracle's report, from a process of its own, since the oracle turns a process into a fake world for good."""
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
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    report: dict[str, Any] = json.loads(process.stdout)
    return report


@pytest.mark.timeout(60 + 10 * DRAWS)
def test_megatron_takes_exactly_the_layouts_that_the_rules_call_legal(report: dict[str, Any]) -> None:
    assert not report["disagreements"], json.dumps(report["disagreements"][:5], indent=2)


def test_the_draws_meet_both_verdicts_and_many_rules(report: dict[str, Any]) -> None:
    counts = report["counts"]
    assert counts["accepted"] >= DRAWS // 5
    assert counts["valid"] >= DRAWS // 10
    assert sum(number for name, number in counts.items() if name.startswith("refused")) >= DRAWS // 10
    assert len(report["broken_alone"]) >= 50
