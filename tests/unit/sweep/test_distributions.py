"""The parameters of Optuna's study: the knobs that vary."""

from optuna.distributions import CategoricalDistribution

from tests.replay import sweep_of, table_of
from tuner.core.layout import Layout
from tuner.sweep.study import distributions

TABLE = table_of(sweep_of())


def test_the_knobs_that_vary_are_the_parameters() -> None:
    space = distributions(TABLE)
    assert space["tp"] == CategoricalDistribution([1, 2, 4])
    assert space["recompute_granularity"] == CategoricalDistribution(["full", "none"])
    assert "cp" not in space
    earlier = distributions(TABLE, [Layout(tp=8, cp=2)])
    assert earlier["tp"] == CategoricalDistribution([1, 2, 4, 8])
    assert earlier["cp"] == CategoricalDistribution([1, 2])
