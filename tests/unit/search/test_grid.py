"""The grid of a default search: the layouts of its domain, with the details of the baseline if they are valid."""

import pandas as pd

from search_spaces.loader import load_cluster
from tests.replay import sweep_of
from tests.unit.search.default_sweeps import default_sweep
from tuner.core.layout import KNOBS
from tuner.rules.validity import valid_mask
from tuner.search.grid import grid_space


def test_the_grid_has_the_baselines_details_wherever_they_are_valid() -> None:
    details = {"tp_comm_overlap": True, "expandable_segments": True, "overlap_grad_reduce": False}
    sweep = default_sweep(baseline={"tp": 2, "sp": True, **details})
    plain, table = grid_space(default_sweep().problem).table, grid_space(sweep.problem).table
    assert len(table) == len(plain)
    assert valid_mask(table, sweep.workload, sweep.cluster).all()
    # Tensor-parallel messages overlap with sequence parallelism only.
    assert (table["tp_comm_overlap"] == table["sp"]).all()
    assert table["sp"].nunique() == 2
    assert table["expandable_segments"].all()
    # The domain of the search sets this knob, so the baseline's value does not replace it.
    assert table["overlap_grad_reduce"].all()
    unchanged = [knob for knob in KNOBS if knob not in details]
    pd.testing.assert_frame_equal(table[unchanged], plain[unchanged])
    assert list(table.dtypes) == list(plain.dtypes)


def test_without_a_refinement_the_grid_keeps_its_own_details() -> None:
    sweep = sweep_of(baseline={"tp": 2, "sp": True, "tp_comm_overlap": True})
    assert not grid_space(sweep.problem).table["tp_comm_overlap"].any()


def test_a_text_of_the_baseline_is_carried_over_too() -> None:
    choice = {"model": "llama3-8b", "seq_length": 8192, "global_batch_size": 128}
    baseline = {"cp": 2, "cp_comm_type": "all_gather"}
    sweep = default_sweep(load_cluster("dgx-h100"), workload=choice, baseline=baseline)
    table = grid_space(sweep.problem).table
    assert set(table["cp_comm_type"][table["cp"] > 1]) == {"all_gather"}
    assert set(table["cp_comm_type"][table["cp"] == 1]) == {"p2p"}
