"""The bootstrap of pooled step times: its 95% intervals hold about as often as they claim."""

import numpy as np
import pytest

from tuner.analysis.bootstrap import pooled_log_times


@pytest.mark.parametrize(("layouts", "runs"), [(4, 3), (2, 2)])
def test_layouts_that_are_equal_are_told_apart_once_in_twenty(layouts: int, runs: int) -> None:
    random = np.random.default_rng(3)
    told_apart = covered = 0
    for _ in range(200):
        shifts = random.normal(0, 0.01, (layouts, runs))
        logs = shifts[:, :, None] + random.normal(0, 0.005, (layouts, runs, 10))
        log_ms, errors = pooled_log_times((100 * np.exp(logs)).tolist(), draws=400)
        low, high = log_ms[1] - log_ms[0] + np.quantile(errors[1] - errors[0], [0.025, 0.975])
        told_apart += not low <= 0 <= high
        low, high = log_ms[0] + np.quantile(errors[0], [0.025, 0.975])
        covered += low <= np.log(100) <= high
    assert told_apart <= 20
    assert covered >= 180
