"""What pruning removes: exactly the rows that it names, and no row that ran where everything was measured."""

from dataclasses import replace

import numpy as np
import pytest

from tests.bench.audit import smaller_than_said, wrongly_dominated, wrongly_too_large
from tests.bench.landscape import LANDSCAPES
from tests.bench.problems import MeasuredProblem, problems
from tests.bench.recorded import STEP_TIMES
from tests.replay import sweep_of, table_of
from tests.trials import CLUSTER, completed_row, failed_row
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.explain.audit import DOMINATED, TOO_LARGE, pruned_rows
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.predict.memory.peak import peak_gib
from tuner.space.table import find_row, layout_at

SWEEP = sweep_of()
TABLE = table_of(SWEEP)
PEAKS = peak_gib(TABLE, SWEEP.workload, SWEEP.cluster)
OOM = Layout(tp=2, micro_batch_size=2)
# On CPU there are no context and workspaces of CUDA, which are larger than this model.
CPU_PEAKS = peak_gib(TABLE, SWEEP.workload, CLUSTER, "torch")


def cpu(memory_gib: float) -> Cluster:
    return replace(CLUSTER, device="cpu", gpu=replace(CLUSTER.gpu, memory_gib=memory_gib))


def test_with_room_for_all_and_no_trials_nothing_is_removed() -> None:
    assert pruned_rows(TABLE, SWEEP.workload, SWEEP.cluster).empty


def test_rows_that_hardly_fit_are_removed_with_their_peak_and_probability() -> None:
    small = cpu(float(np.median(CPU_PEAKS)))
    fits = fit_probabilities(TABLE, SWEEP.workload, small)
    pruned = pruned_rows(TABLE, SWEEP.workload, small)
    assert 0 < len(pruned) < len(TABLE)
    assert pruned.index.tolist() == np.flatnonzero(fits < MIN_FIT).tolist()
    assert set(pruned["reason"]) == {TOO_LARGE}
    assert pruned["predicted_gib"].tolist() == pytest.approx(CPU_PEAKS[pruned.index])
    assert pruned["fit"].tolist() == fits[pruned.index].tolist()
    assert (pruned["trial"] == -1).all()


def test_an_oom_beside_others_removes_no_row() -> None:
    beside = replace(failed_row(1).result, occupied_gpus=("others held 20.00 GiB of GPU 0 (processes: 77)",))
    trials = [replace(failed_row(1), layout=OOM, result=beside)]
    assert DOMINATED not in set(pruned_rows(TABLE, SWEEP.workload, SWEEP.cluster, trials)["reason"])


def test_rows_above_an_oom_are_removed_with_the_first_trial_that_rules_them_out() -> None:
    trials = [
        completed_row(0, 100.0, layout=Layout(tp=4)),
        replace(failed_row(1), layout=OOM),
        replace(failed_row(2), layout=replace(OOM, pp=2)),
    ]
    pruned = pruned_rows(TABLE, SWEEP.workload, SWEEP.cluster, trials)
    assert set(pruned["reason"]) == {DOMINATED}
    reasons = {
        layout_at(pruned, row): (pruned["trial"].iloc[row], pruned["along"].iloc[row])
        for row in range(len(pruned))
    }
    assert reasons[replace(OOM, micro_batch_size=4)] == (1, "micro_batch_size")
    assert reasons[replace(OOM, pp=2, micro_batch_size=4)] == (2, "micro_batch_size")
    expected = np.zeros(len(TABLE), dtype=bool)
    for trial in trials[1:]:
        expected |= needs_at_least_as_much_memory(TABLE, trial.layout, SWEEP.workload, SWEEP.cluster)
    expected &= [layout_at(TABLE, row) not in {trial.layout for trial in trials} for row in range(len(TABLE))]
    assert pruned.index.tolist() == np.flatnonzero(expected).tolist()


def test_recompute_that_a_row_drops_is_named_as_one_axis() -> None:
    full = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    pruned = pruned_rows(TABLE, SWEEP.workload, SWEEP.cluster, [replace(failed_row(0), layout=full)])
    along = {layout_at(pruned, row): pruned["along"].iloc[row] for row in range(len(pruned))}
    assert along[Layout()] == "recompute"
    assert along[Layout(micro_batch_size=2)] == "micro_batch_size, recompute"


def test_a_row_that_was_tried_is_not_removed() -> None:
    none_fit = cpu(CPU_PEAKS.min() / 2)
    assert len(pruned_rows(TABLE, SWEEP.workload, none_fit)) == len(TABLE)
    pruned = pruned_rows(TABLE, SWEEP.workload, none_fit, [replace(failed_row(0), layout=OOM)])
    assert len(pruned) == len(TABLE) - 1
    assert find_row(pruned, OOM) is None


def test_the_bench_finds_what_is_wrong() -> None:
    """In this problem, the layouts that ran are those that should not have run."""
    rows = [find_row(TABLE, layout) for layout in (OOM, replace(OOM, micro_batch_size=4))]
    assert None not in rows
    small, large = (int(row) for row in rows if row is not None)
    step_ms = np.full((len(TABLE), 1), 100.0)
    step_ms[small] = np.nan
    peaks = PEAKS.copy()
    wrong = MeasuredProblem(
        name="wrong",
        workload=SWEEP.workload,
        cluster=SWEEP.cluster,
        table=TABLE,
        step_times_ms=step_ms,
        peak_gib=peaks,
    )
    assert (small, large) in wrongly_dominated(wrong)
    assert smaller_than_said(wrong)[0] == []
    peaks[large] = peaks[find_row(TABLE, replace(OOM, micro_batch_size=1)) or 0] / 2
    assert any(pair[1] == large for pair in smaller_than_said(wrong)[0])
    none_fit = cpu(CPU_PEAKS.min() / 2)
    crowded = replace(wrong, name="crowded", cluster=none_fit, peak_gib=None)
    assert wrongly_too_large(crowded).tolist() == np.flatnonzero(np.isfinite(step_ms[:, 0])).tolist()


@pytest.mark.skipif(
    not STEP_TIMES.exists() and not list(LANDSCAPES.glob("*/trials.csv")),
    reason="neither the recorded step times of ../shared/data nor a published landscape is here",
)
def test_where_everything_was_measured_pruning_removes_nothing_that_ran() -> None:
    measured_problems = list(problems())
    assert measured_problems
    for problem in measured_problems:
        assert wrongly_too_large(problem).tolist() == [], problem.name
        assert wrongly_dominated(problem) == [], problem.name
        assert smaller_than_said(problem)[0] == [], problem.name
