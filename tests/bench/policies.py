"""Search policies over a table of layouts, for the replay: each says which row to measure next."""

import warnings
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import IntDistribution

from tests.bench.recorded import Group
from tuner.predict.time import step_time_ms
from tuner.search.ranking import Ranking, encode

Mask = NDArray[np.bool_]

SEARCHED: Final = ("tp", "pp", "micro_batch_size")
"""The knobs that differ within a recorded group."""


class Policy(Protocol):
    """A search of one group."""

    def choose(self, available: Mask) -> int:
        """The next row, one of `available`."""
        ...

    def tell(self, row: int, measured_ms: float) -> None:
        """Take in what the row measured."""
        ...


class Predicted:
    """Ours: predicted step time, corrected by a Gaussian process on the measured ones."""

    def __init__(self, group: Group, seed: int) -> None:
        predicted = step_time_ms(group.table, group.workload, group.cluster, "torch")
        self._ranking = Ranking(encode(group.table), predicted)

    def choose(self, available: Mask) -> int:
        return self._ranking.choose(available)

    def tell(self, row: int, measured_ms: float) -> None:
        self._ranking.tell(row, measured_ms)


class Order:
    """Rows in an order that is settled before the first trial."""

    def __init__(self, order: NDArray[np.intp]) -> None:
        self._order = order

    def choose(self, available: Mask) -> int:
        return int(next(row for row in self._order if available[row]))

    def tell(self, row: int, measured_ms: float) -> None:
        """Nothing is learnt."""


def random_order(group: Group, seed: int) -> Order:
    """Any row."""
    return Order(np.random.default_rng(seed).permutation(len(group.table)))


def folk_rule(group: Group, seed: int) -> Order:
    """The least model parallelism that fits, TP before PP, then the largest micro-batch."""
    tp, pp, micro = (group.table[knob].to_numpy() for knob in SEARCHED)
    return Order(np.lexsort((-micro, pp, tp * pp)))


class Sampled:
    """An Optuna sampler over the logarithms of the knobs; a suggestion falls to the nearest row left."""

    def __init__(self, group: Group, sampler: optuna.samplers.BaseSampler) -> None:
        self._points = np.log2(group.table[list(SEARCHED)].to_numpy(dtype=np.float64))
        self._space = {
            knob: IntDistribution(0, int(column.max()))
            for knob, column in zip(SEARCHED, self._points.T, strict=True)
            if column.max() > 0
        }
        self._study = optuna.create_study(sampler=sampler)
        self._trial: optuna.Trial | None = None

    def choose(self, available: Mask) -> int:
        self._trial = self._study.ask()
        wanted = [
            self._trial.suggest_int(k, 0, self._space[k].high) if k in self._space else 0 for k in SEARCHED
        ]
        rows = np.flatnonzero(available)
        return int(rows[np.abs(self._points[rows] - wanted).sum(axis=1).argmin()])

    def tell(self, row: int, measured_ms: float) -> None:
        """Told as what was measured, not as what was asked for."""
        params = {k: round(v) for k, v in zip(SEARCHED, self._points[row], strict=True) if k in self._space}
        assert self._trial is not None
        if self._trial.params == params:
            self._study.tell(self._trial, float(np.log(measured_ms)))
            return
        self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
        self._study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=dict(self._space), value=float(np.log(measured_ms))
            )
        )


def tpe(group: Group, seed: int) -> Sampled:
    """Optuna's tree-structured Parzen estimator, as it comes."""
    return Sampled(group, optuna.samplers.TPESampler(seed=seed))


def gaussian_process(group: Group, seed: int) -> Sampled:
    """Optuna's Gaussian process; five random trials first, since ten are half a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return Sampled(group, optuna.samplers.GPSampler(seed=seed, n_startup_trials=5))


POLICIES: Final[Mapping[str, Callable[[Group, int], Policy]]] = {
    "ours": Predicted,
    "folk": folk_rule,
    "random": random_order,
    "tpe": tpe,
    "gp": gaussian_process,
}
SEEDLESS: Final = frozenset({"ours", "folk"})
