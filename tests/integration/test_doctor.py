"""`megatune doctor` on the real Megatron-Core of this environment."""

import json
from pathlib import Path

import pytest

from tuner.cli.app import run


def test_doctor_loads_megatron_and_finds_nothing_amiss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", "--json"]) == 0
    status = {check["check"]: check["status"] for check in json.loads(capsys.readouterr().out)}
    assert status["megatron imports"] == "ok"
    assert "failed" not in status.values()
    assert not list(tmp_path.iterdir())
