"""The published landscapes hold every layout, and their best layouts are found in a few trials."""

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from tests.bench.landscape import LANDSCAPES, REPEATS, Landscape, landscapes, read
from tests.bench.problems import measured, searched
from tests.bench.replay import table


@pytest.fixture(scope="module")
def published() -> list[Landscape]:
    return list(landscapes())


def test_both_landscapes_hold_every_layout_three_times_and_some_ran_out_of_memory(
    published: list[Landscape],
) -> None:
    assert [landscape.sweep.name for landscape in published] == ["cpu-4-tiny-gpt", "cpu-4-tiny-moe"]
    for landscape in published:
        assert landscape.step_time_ms.shape == (len(landscape.table), REPEATS)
        assert len(landscape.table) >= 60
        ran = np.isfinite(landscape.step_time_ms)
        assert (ran.all(axis=1) | ~ran.any(axis=1)).all(), "a layout fits in every repeat or in none"
        assert 0 < (~ran.all(axis=1)).sum() < len(landscape.table) / 4


def test_a_landscape_that_lacks_a_trial_is_refused(tmp_path: Path) -> None:
    folder = copytree(next(LANDSCAPES.glob("*gpt")), tmp_path / "torn")
    trials = folder / "trials.csv"
    trials.write_text(trials.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(ValueError, match="does not hold every layout"):
        read(folder)


def test_the_best_of_a_landscape_is_found_in_a_few_trials() -> None:
    for problem in measured():
        ours = table([searched(problem)], ["ours"], seeds=3).loc["ours"]
        assert ours["to within 2%"] <= 8
