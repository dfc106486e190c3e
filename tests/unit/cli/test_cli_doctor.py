"""`megatune doctor` looks at all that a trial needs; tests/integration/test_doctor.py has it load the real Megatron."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tuner.cli.app import run

PROGRAM = "launchers.programs.megatron_core"


def test_doctor_names_what_a_trial_needs_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, train = ModuleType(PROGRAM), ModuleType(f"{PROGRAM}.train")
    train.__package__ = PROGRAM
    program.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PROGRAM, program)
    monkeypatch.setitem(sys.modules, train.__name__, train)
    assert run(["doctor", "--json"]) == 0
    checks = {check["check"]: check for check in json.loads(capsys.readouterr().out)}
    needed = ("torch", "megatron-core", "optuna", "mlflow", "megatron imports", "machine", "gloo on loopback")
    assert all(checks[name]["status"] == "ok" for name in needed)
    assert re.match(r"\d+\.\d+\S*, (not )?tested", checks["megatron-core"]["told"])
    assert checks["megatron imports"]["told"] == f"the program {PROGRAM} loads"
    assert not list(Path().iterdir())


def test_doctor_fails_where_megatron_does_not_load_or_the_results_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PROGRAM, None)
    Path("file").write_text("")
    assert run(["doctor", "--results", "file/results", "--json"]) == 2
    checks = {check["check"]: check for check in json.loads(capsys.readouterr().out)}
    assert {name for name, check in checks.items() if check["status"] == "failed"} == {
        "megatron imports",
        "results folder",
    }
    assert "ModuleNotFoundError" in checks["megatron imports"]["told"]
