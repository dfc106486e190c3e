"""What is predicted not to fit is never launched; what may fit stays, and weighs as much as it is likely to."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from search_spaces.loader import load_cluster, load_model
from tests.replay import sweep_of, table_of
from tuner.cli.common import load, prepare
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import NothingFeasibleError
from tuner.predict.feasibility import LAYOUT_ERROR, MIN_FIT, SHARED_ERROR, Feasibility, fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.overhead import beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import peak_gib
from tuner.search.ranking import Ranking

Floats = NDArray[np.float64]

SWEEP = """
name: fits
workload: {{model: tiny-gpt, seq_length: 128, global_batch_size: 8, precision: fp32}}
cluster: {{name: cpu-4, memory_gib: {memory_gib}}}
knobs: {{pp: [1, 2, 4], micro_batch_size: [1, 2, 4]}}
{more}
"""


def sweep_file(folder: Path, memory_gib: float, more: str = "") -> Path:
    path = folder / "sweep.yaml"
    path.write_text(SWEEP.format(memory_gib=memory_gib, more=more))
    return path


def test_the_probability_falls_as_the_predicted_peak_rises() -> None:
    sweep = sweep_of()
    table = table_of(sweep)
    fits = fit_probabilities(table, sweep.workload, sweep.cluster)
    peaks = peak_gib(table, sweep.workload, sweep.cluster, implementation_of(sweep.cluster))
    assert ((fits >= 0) & (fits <= 1)).all()
    assert (np.diff(fits[np.argsort(peaks)]) <= 0).all()


def test_rows_predicted_not_to_fit_are_left_out_and_counted(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, 0.034)
    loaded = load(path)
    prepared = prepare(loaded, path)
    fits = fit_probabilities(loaded.space.table, loaded.sweep.workload, loaded.sweep.cluster)
    assert 0 < prepared.too_large == int((fits < MIN_FIT).sum()) < len(loaded.space.table)
    assert len(prepared.table) == len(loaded.space.table) - prepared.too_large


def test_where_nothing_is_predicted_to_fit_the_sweep_says_so_before_it_launches_anything(
    tmp_path: Path,
) -> None:
    path = sweep_file(tmp_path, 0.001)
    with pytest.raises(
        NothingFeasibleError, match=r"all 8 valid layouts are predicted to need more than 0.001 GiB"
    ):
        prepare(load(path), path)


def test_a_stated_baseline_runs_whatever_is_predicted(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, 0.001, "baseline: {pp: 2}")
    prepared = prepare(load(path), path)
    assert len(prepared.table) == 1
    assert [layout for layout, _ in prepared.queue][:1] == [Layout(pp=2)]


def test_a_row_that_hardly_fits_waits_behind_a_slower_one_that_does() -> None:
    features, predicted_ms = np.array([[0.0], [1.0]]), np.array([100.0, 120.0])
    everything = np.array([True, True])
    assert Ranking(features, predicted_ms).choose(everything) == 0
    assert Ranking(features, predicted_ms, np.array([0.05, 1.0])).choose(everything) == 1


def feasibility(memory_gib: float, device: Literal["cpu", "cuda"] = "cpu") -> tuple[Feasibility, Floats]:
    """Of the usual table on a GPU of so much memory, and the predicted peaks."""
    sweep, gpu = sweep_of(), sweep_of().cluster.gpu
    table = table_of(sweep)
    cluster = replace(sweep.cluster, device=device, gpu=replace(gpu, memory_gib=memory_gib))
    return Feasibility(table, sweep.workload, cluster), peak_gib(
        table, sweep.workload, cluster, implementation_of(cluster)
    )


def middle() -> float:
    return float(np.median(feasibility(1.0)[1]))


def test_what_fit_with_room_to_spare_says_that_its_like_fit_too() -> None:
    of, peaks = feasibility(middle())
    before = of.probabilities()
    near = np.flatnonzero((before > 0.2) & (before < 0.8))
    for row in np.argsort(peaks)[:6]:
        of.tell(int(row), float(peaks[row] * 0.9))
    assert len(near)
    assert (of.probabilities()[near] > before[near]).all()


def test_peaks_that_were_predicted_exactly_make_the_boundary_sharp() -> None:
    of, peaks = feasibility(middle() * 1.03)
    row = int(np.abs(peaks - middle()).argmin())
    before = of.probabilities()[row]
    for other in np.argsort(peaks)[:12]:
        of.tell(int(other), float(peaks[other]))
    assert 0.5 < before < of.probabilities()[row]
    assert of.probabilities()[row] > 0.95


def test_a_row_that_ran_out_of_memory_takes_down_what_needs_as_much() -> None:
    of, peaks = feasibility(middle() * 1.02)
    rows = np.argsort(np.abs(peaks - middle()))[:2]
    before = of.probabilities()
    of.tell(int(rows[0]), None)
    likely = before > 0.05  # an error that large makes all others likelier, also downwards
    assert (of.probabilities()[likely] <= before[likely]).all()
    assert of.probabilities()[rows[1]] < before[rows[1]] - 0.05


def test_a_row_that_must_run_out_of_memory_teaches_nothing_when_it_does() -> None:
    of, peaks = feasibility(middle())
    before = of.probabilities()
    largest = int(peaks.argmax())
    assert before[largest] < 0.01
    of.tell(largest, None)
    assert of.probabilities() == pytest.approx(before, abs=0.01)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_the_trials_does_not_matter(order: list[int]) -> None:
    told = [(0, 1.02), (1, 0.99), (2, None), (3, 1.05)]
    of, peaks = feasibility(middle())
    for row, ratio in (told[place] for place in order):
        of.tell(row, None if ratio is None else float(peaks[row] * ratio))
    other, _ = feasibility(middle())
    for row, ratio in told:
        other.tell(row, None if ratio is None else float(peaks[row] * ratio))
    assert of.probabilities() == pytest.approx(other.probabilities(), abs=1e-9)


def test_on_cuda_the_context_and_nccl_count_and_are_uncertain() -> None:
    of = Workload(model=load_model("llama3-8b"), seq_length=4096, global_batch_size=64)
    cluster = replace(load_cluster("dgx-h100"), nodes=1)
    table = pd.DataFrame([asdict(Layout(tp=2))])
    needs = float(peak_gib(table, of, cluster)[0]) * float(reserved_ratio(table, cluster)[0])
    beyond = float(beyond_allocated_gib(table, of, cluster)[0])

    def fits(memory_gib: float) -> float:
        on = replace(cluster, gpu=replace(cluster.gpu, memory_gib=memory_gib))
        return float(fit_probabilities(table, of, on)[0])

    assert fits(needs) < 0.2
    assert fits(needs + beyond) == pytest.approx(0.5, abs=0.02)
    assert 0.7 < fits(needs + 1.5 * beyond) < 0.99
    assert fits(needs + 3 * beyond) > 0.95


def test_on_a_gpu_smaller_than_what_cuda_itself_takes_hardly_anything_fits() -> None:
    tiny, _ = feasibility(0.05, "cuda")
    assert tiny.probabilities().max() < 0.1
    tiny.tell(0, None)
    assert np.isfinite(tiny.probabilities()).all()


def test_a_true_error_scale_is_met_on_average() -> None:
    """Of rows whose peak really is off by the stated error, those given a probability p fit as often as p says."""
    random, peaks = np.random.default_rng(5), feasibility(1.0)[1]
    stated, fit = [], []
    for _ in range(100):
        memory_gib = float(random.choice(peaks) * np.exp(random.normal() * 0.03))
        bias, error = random.normal() * SHARED_ERROR, LAYOUT_ERROR * 2 ** random.normal()
        measured = peaks * np.exp(bias + error * random.normal(size=len(peaks)))
        of, _ = feasibility(memory_gib)
        for row in random.permutation(len(peaks))[:8]:
            of.tell(int(row), float(measured[row]) if measured[row] <= memory_gib else None)
        stated.append(of.probabilities())
        fit.append(measured <= memory_gib)
    probability, fits = np.concatenate(stated), np.concatenate(fit)
    for low, high in ((0.02, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.98)):
        among = (probability >= low) & (probability < high)
        assert among.sum() > 50
        assert fits[among].mean() == pytest.approx(probability[among].mean(), abs=0.12)
