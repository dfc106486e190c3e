"""The table of trials: one row per trial, with every knob and every measurement."""

import pytest

from tests.unit.nights import NIGHT
from tuner.core.layout import KNOBS, Layout
from tuner.report.table import trial_table


def test_the_table_holds_every_trial_knob_and_measurement() -> None:
    table = trial_table(NIGHT)
    assert table["number"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["outcome"].tolist() == ["completed", "oom", "completed", "completed", "timeout", "oom"]
    assert table["step_time_ms"].isna().tolist() == [False, True, False, False, True, True]
    assert table["tokens_per_s_per_gpu"].dropna().tolist() == pytest.approx(
        [2560.0, 3200.0, 2048 / 0.0815 / 8]
    )
    assert set(KNOBS) <= set(table.columns)
    assert [Layout(**{knob: row[knob] for knob in KNOBS}) for row in table.to_dict("records")] == [
        row.layout for row in NIGHT
    ]


def test_the_table_of_no_trials_has_its_columns() -> None:
    assert list(trial_table([]).columns) == list(trial_table(NIGHT).columns)
