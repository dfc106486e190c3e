"""Rows that are predicted not to fit are never launched; the others weigh as much as they are likely to fit."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from search_spaces.loader import load_cluster, load_model
from tests.replay import sweep_of, table_of
from tuner.cli.planning import load, prepare
from tuner.core.columns import Floats
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import NothingFeasibleError
from tuner.predict.feasibility import LAYOUT_ERROR, MIN_FIT, SHARED_ERROR, Feasibility, fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.overhead import beyond_allocated_gib, reserved_ratio
from tuner.predict.memory.peak import peak_gib
from tuner.search.ranking import Ranking

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
    peaks_gib = peak_gib(table, sweep.workload, sweep.cluster, implementation_of(sweep.cluster))
    assert ((fits >= 0) & (fits <= 1)).all()
    assert (np.diff(fits[np.argsort(peaks_gib)]) <= 0).all()


def test_rows_predicted_not_to_fit_are_left_out_and_counted(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, 0.034)
    loaded = load(path)
    prepared = prepare(loaded, path)
    fits = fit_probabilities(loaded.space.table, loaded.sweep.workload, loaded.sweep.cluster)
    assert 0 < prepared.too_large == int((fits < MIN_FIT).sum()) < len(loaded.space.table)
    assert len(prepared.table) == len(loaded.space.table) - prepared.too_large


def test_a_sweep_in_which_nothing_is_predicted_to_fit_says_so_before_it_launches_anything(
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
    assert [queued.layout for queued in prepared.queue][:1] == [Layout(pp=2)]


def test_a_row_that_hardly_fits_waits_behind_a_slower_row_that_does() -> None:
    features, predicted_ms = np.array([[0.0], [1.0]]), np.array([100.0, 120.0])
    everything = np.array([True, True])
    assert Ranking(features, predicted_ms).choose(everything) == 0
    assert Ranking(features, predicted_ms, np.array([0.05, 1.0])).choose(everything) == 1


SMALL_SWEEP = sweep_of()
SMALL_TABLE = table_of(SMALL_SWEEP)
CPU_CLUSTER = replace(SMALL_SWEEP.cluster, device="cpu")
PEAKS_GIB = peak_gib(SMALL_TABLE, SMALL_SWEEP.workload, CPU_CLUSTER, implementation_of(CPU_CLUSTER))
"""Predicted peaks of the rows of SMALL_TABLE on CPU."""
MEDIAN_GIB = float(np.median(PEAKS_GIB))


def feasibility(memory_gib: float, device: Literal["cpu", "cuda"] = "cpu") -> Feasibility:
    """Return the feasibility of SMALL_TABLE on GPUs with so much memory."""
    gpu = replace(CPU_CLUSTER.gpu, memory_gib=memory_gib)
    cluster = replace(CPU_CLUSTER, device=device, gpu=gpu)
    return Feasibility(SMALL_TABLE, SMALL_SWEEP.workload, cluster)


def test_trials_that_fit_with_room_to_spare_make_similar_rows_likelier_to_fit() -> None:
    fits = feasibility(MEDIAN_GIB)
    before = fits.probabilities()
    uncertain = np.flatnonzero((before > 0.2) & (before < 0.8))
    for row in np.argsort(PEAKS_GIB)[:6]:
        fits.tell(int(row), float(PEAKS_GIB[row] * 0.9))
    assert len(uncertain)
    assert (fits.probabilities()[uncertain] > before[uncertain]).all()


def test_peaks_that_were_predicted_exactly_make_the_boundary_sharp() -> None:
    fits = feasibility(MEDIAN_GIB * 1.03)
    row = int(np.abs(PEAKS_GIB - MEDIAN_GIB).argmin())
    before = fits.probabilities()[row]
    for other in np.argsort(PEAKS_GIB)[:12]:
        fits.tell(int(other), float(PEAKS_GIB[other]))
    assert 0.5 < before < fits.probabilities()[row]
    assert fits.probabilities()[row] > 0.95


def test_a_row_that_ran_out_of_memory_makes_rows_that_need_as_much_less_likely_to_fit() -> None:
    fits = feasibility(MEDIAN_GIB * 1.02)
    rows = np.argsort(np.abs(PEAKS_GIB - MEDIAN_GIB))[:2]
    before = fits.probabilities()
    fits.tell(int(rows[0]), None)
    likely = before > 0.05  # A large error makes all other errors likelier, those downwards too.
    assert (fits.probabilities()[likely] <= before[likely]).all()
    assert fits.probabilities()[rows[1]] < before[rows[1]] - 0.05


def test_a_row_that_must_run_out_of_memory_teaches_nothing_when_it_does() -> None:
    fits = feasibility(MEDIAN_GIB)
    before = fits.probabilities()
    largest = int(PEAKS_GIB.argmax())
    assert before[largest] < 0.01
    fits.tell(largest, None)
    assert fits.probabilities() == pytest.approx(before, abs=0.01)


def test_the_order_of_the_trials_does_not_matter() -> None:
    trials = [(0, 1.02), (1, 0.99), (2, None), (3, 1.05)]
    first, *others = (
        _probabilities_after(order) for order in (trials, trials[::-1], trials[2:] + trials[:2])
    )
    for probabilities in others:
        assert probabilities == pytest.approx(first, abs=1e-9)


def _probabilities_after(trials: Sequence[tuple[int, float | None]]) -> Floats:
    """Return the probabilities after trials, each a row and measured / predicted, or None if it ran out of memory."""
    fits = feasibility(MEDIAN_GIB)
    for row, ratio in trials:
        fits.tell(row, None if ratio is None else float(PEAKS_GIB[row] * ratio))
    return fits.probabilities()


def test_on_cuda_the_context_and_nccl_count_and_are_uncertain() -> None:
    workload = Workload(model=load_model("llama3-8b"), seq_length=4096, global_batch_size=64)
    cluster = replace(load_cluster("dgx-h100"), nodes=1)
    table = pd.DataFrame([asdict(Layout(tp=2))])
    reserved_gib = float(peak_gib(table, workload, cluster)[0]) * float(reserved_ratio(table, cluster)[0])
    beyond_gib = float(beyond_allocated_gib(table, workload, cluster)[0])

    def fits(memory_gib: float) -> float:
        sized = replace(cluster, gpu=replace(cluster.gpu, memory_gib=memory_gib))
        return float(fit_probabilities(table, workload, sized)[0])

    assert fits(reserved_gib) < 0.2
    assert fits(reserved_gib + beyond_gib) == pytest.approx(0.5, abs=0.02)
    assert 0.7 < fits(reserved_gib + 1.5 * beyond_gib) < 0.99
    assert fits(reserved_gib + 3 * beyond_gib) > 0.95


def test_on_a_gpu_smaller_than_what_cuda_itself_takes_hardly_anything_fits() -> None:
    fits = feasibility(0.05, "cuda")
    assert fits.probabilities().max() < 0.1
    fits.tell(0, None)
    assert np.isfinite(fits.probabilities()).all()


def test_stated_probabilities_are_met_on_average_if_the_errors_follow_the_prior() -> None:
    random = np.random.default_rng(5)
    stated, fit = [], []
    for _ in range(100):
        memory_gib = float(random.choice(PEAKS_GIB) * np.exp(random.normal() * 0.03))
        shared_error, deviation = random.normal() * SHARED_ERROR, LAYOUT_ERROR * 2 ** random.normal()
        measured_gib = PEAKS_GIB * np.exp(shared_error + deviation * random.normal(size=len(PEAKS_GIB)))
        fits = feasibility(memory_gib)
        for row in random.permutation(len(PEAKS_GIB))[:8]:
            fits.tell(int(row), float(measured_gib[row]) if measured_gib[row] <= memory_gib else None)
        stated.append(fits.probabilities())
        fit.append(measured_gib <= memory_gib)
    probability, did_fit = np.concatenate(stated), np.concatenate(fit)
    for low, high in ((0.02, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.98)):
        rows = (probability >= low) & (probability < high)
        assert rows.sum() > 50
        assert did_fit[rows].mean() == pytest.approx(probability[rows].mean(), abs=0.12)


def test_without_transformer_engine_less_fits() -> None:
    cluster = replace(load_cluster("dgx-h100"), gpus_per_node=1, nvlink_domain_gpus=1)
    workload = Workload(model=load_model("qwen3-0.6b"), seq_length=4096, global_batch_size=16)
    table = pd.DataFrame([asdict(Layout(micro_batch_size=8))])
    with_it, without = (
        float(fit_probabilities(table, workload, replace(cluster, transformer_engine=installed))[0])
        for installed in (True, False)
    )
    assert with_it > 0.9
    assert without < 0.01
