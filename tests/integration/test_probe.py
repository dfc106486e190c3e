"""The oracle of peak memory agrees with the predictor, probes ranks of large worlds, and has a command."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from launchers.machine.probe import probe
from tests.bench.oracle_memory import Draw, MeasuredDraw, ask_all, cpu_cluster, draws, line
from tests.integration.test_predict_memory_trials import case
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.predict.memory.peak import memory_breakdown
from tuner.trial.contract import TrialSpec

SWEEP = """
name: probed
workload: {model: tiny-gpt, seq_length: 128, global_batch_size: 16, precision: fp32}
cluster: cpu-4
"""
DRAWS, SEED, MOST_MICROBATCHES = 6, 1, 2


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture(scope="module")
def probed() -> list[MeasuredDraw]:
    return list(ask_all(list(islice(draws(SEED, MOST_MICROBATCHES), DRAWS))))


def test_peaks_of_random_layouts_are_predicted_within_two_percent_on_average(
    probed: list[MeasuredDraw],
) -> None:
    errors = np.abs([measured.error for measured in probed])
    table = "\n".join(map(line, probed))
    assert {case.draw.family for case in probed} == {"dense", "moe", "mla"}
    assert {case.draw.workload.precision for case in probed} == {"fp32", "bf16"}
    assert errors.mean() <= 0.02, table
    assert errors.max() <= 0.08, table


def draw_of(spec: TrialSpec, stage: int, global_batch_size: int) -> Draw:
    workload = replace(spec.workload, global_batch_size=global_batch_size)
    predicted = memory_breakdown(spec.layout, workload, spec.cluster, "torch")[stage]
    return Draw(family="", workload=workload, cluster=spec.cluster, layout=spec.layout, stage=predicted)


def peaks(of: list[Draw]) -> Iterator[float]:
    return (measured.measured_gib for measured in ask_all(of))


def test_more_micro_batches_than_fill_the_pipeline_change_no_peak() -> None:
    few, many = (
        draw_of(case("tiny-gpt", pp=2, vpp=2, overlap_p2p_comm=True), stage=0, global_batch_size=size)
        for size in (12, 24)
    )
    assert len(set(peaks([few, many]))) == 1


def test_a_rank_of_a_world_larger_than_any_machine_is_probed() -> None:
    spec = case("tiny-moe", ranks=512, tp=2, sp=True, pp=4, ep=8)
    big = replace(spec, workload=replace(spec.workload, global_batch_size=512), cluster=cpu_cluster(512))
    record = probe(big, 511)
    stage = memory_breakdown(big.layout, big.workload, big.cluster, "torch")[3]
    assert record.failure is None
    assert record.rank == 511
    assert record.step == 2
    assert record.peak_allocated_gib == pytest.approx(stage.total_gib, rel=0.03)


def test_megatrons_refusal_is_in_the_record() -> None:
    spec = case("tiny-gpt", pp=2)
    record = probe(replace(spec, layout=Layout(pp=3)), 0)
    assert record.failure is not None
    assert record.peak_allocated_gib is None
    assert record.phase == "build"


def test_the_command_prints_measured_beside_predicted(
    sweep_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["probe", str(sweep_file), "pp=2", "--rank", "stages", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert [rank["rank"] for rank in printed["ranks"]] == [0, 2]
    for rank in printed["ranks"]:
        parts = [value for name, value in rank["predicted"].items() if name.endswith("_gib")]
        assert sum(parts) == pytest.approx(rank["predicted_peak_gib"])
        assert abs(rank["difference"]) < 0.02


def test_the_rank_predicted_to_need_most_is_probed_unless_one_is_named(
    sweep_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["probe", str(sweep_file), "pp=4", "use_distributed_optimizer=false"]) == 0
    captured = capfd.readouterr()
    assert "probing rank 0 of 4" in captured.err
    assert "measured peak" in captured.out
    assert "predicted peak" in captured.out


def test_a_rank_outside_the_world_is_refused(sweep_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", str(sweep_file), "pp=2", "--rank", "4"]) == 2
    assert "--rank 4: there are ranks 0 to 3, or 'stages'" in capfd.readouterr().err
