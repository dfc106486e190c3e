"""What is predicted not to fit is never launched; what may fit stays, and weighs as much as it is likely to."""

from pathlib import Path

import numpy as np
import pytest

from tests.replay import sweep_of, table_of
from tuner.cli.common import load, prepare
from tuner.errors import NothingFeasibleError
from tuner.layout import Layout
from tuner.predict import implementation_of
from tuner.predict.memory import peak_gib
from tuner.search.feasibility import MIN_FIT, fit_probabilities
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
