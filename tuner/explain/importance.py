"""Which choices mattered in a sweep: their shares of the variance of its measured step times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.choices import CHOICES, value_of
from tuner.core.columns import Floats
from tuner.core.layout import Layout

FEWEST_TRIALS: Final = 8
"""Fewest trials that shares are computed from. Assumed: with three or four points per choice, a forest of trees splits
on noise."""
MOST_TRIALS: Final = 512
"""Most trials that shares are computed from, since the time grows with the square of their number: of more trials, as
many are taken at even distances. Chosen: they take about 3 s."""
TREES: Final = 64
"""Trees of the forest, and their largest depth: the defaults of Optuna's FanovaImportanceEvaluator."""


def importances(layouts: Sequence[Layout], step_time_ms: Sequence[float]) -> dict[str, float]:
    """Return the share of each choice that varied, largest first; the shares sum to 1.

    The shares come from a functional ANOVA on log(step time) of the completed trials (Hutter, Hoos and Leyton-Brown
    2014, "An efficient approach for assessing hyperparameter importance"). They describe the layouts that were tried,
    not the space: no sampler draws the space evenly. The result is empty for fewer trials than FEWEST_TRIALS, or if
    nothing varied.

    They equal the shares of Optuna's FanovaImportanceEvaluator. Its time doubles with each further value of a choice,
    so that it may never end.

    Args:
        layouts: the layouts of the completed trials.
        step_time_ms: the measured step time of each of these trials.
    """
    taken = np.unique(np.linspace(0, len(layouts) - 1, min(MOST_TRIALS, len(layouts))).astype(np.intp))
    layouts, log_ms = (
        [layouts[place] for place in taken],
        np.log(np.asarray(step_time_ms, dtype=np.float64)[taken]),
    )
    values = {
        choice: np.array([value_of(choice, layout) for layout in layouts]) for choice in sorted(CHOICES)
    }
    varied = {choice: of_choice for choice, of_choice in values.items() if len(set(of_choice.tolist())) > 1}
    if len(layouts) < FEWEST_TRIALS or not varied or np.ptp(log_ms) == 0:
        return {}
    one_hot = [of_choice[:, None] == np.unique(of_choice) for of_choice in varied.values()]
    columns = np.repeat(np.arange(len(one_hot)), [of_choice.shape[1] for of_choice in one_hot])
    explained = _explained(np.column_stack(one_hot).astype(np.float64), log_ms, columns)
    # If choices matter only together, none explains anything by itself.
    shares = explained / explained.sum() if explained.any() else np.full(len(varied), 1 / len(varied))
    return dict(sorted(zip(varied, shares.tolist(), strict=True), key=lambda share: -share[1]))


def _explained(points: Floats, values: Floats, choice_of_column: NDArray[np.intp]) -> Floats:
    """Return which share of a forest's variance each choice explains by itself, of shape [choices].

    Args:
        points: the points that the forest is fitted to, of shape [points, columns], between 0 and 1.
        values: the value at each point.
        choice_of_column: the number of the choice that each column belongs to.
    """
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(n_estimators=TREES, max_depth=TREES, random_state=0).fit(points, values)
    choices = range(int(choice_of_column.max()) + 1)
    shares = []
    for estimator in forest.estimators_:
        leaves = _Leaves.of(estimator.tree_)
        variance = leaves.variance(np.ones(len(choice_of_column), dtype=np.bool_))
        if variance > 0:
            own = [leaves.variance(choice_of_column == choice) for choice in choices]
            shares.append(np.maximum(own, 0) / variance)
    return np.mean(shares, axis=0) if shares else np.zeros(len(choices))


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The leaves of a tree: boxes in the unit cube, in each of which the tree has one value."""

    low: Floats
    """The lower corner of each box, of shape [leaves, columns]."""
    high: Floats
    """The upper corner of each box, of shape [leaves, columns]."""
    values: Floats
    """The value in each box, of shape [leaves]."""

    @classmethod
    def of(cls, tree: Any) -> "_Leaves":
        """Return the leaves of a tree of scikit-learn."""
        low = np.zeros((tree.node_count, tree.n_features))
        high = np.ones_like(low)
        # A node has a smaller number than its children.
        for node, (feature, left, right) in enumerate(
            zip(tree.feature, tree.children_left, tree.children_right, strict=True)
        ):
            if left >= 0:
                low[[left, right]], high[[left, right]] = low[node], high[node]
                high[left, feature] = low[right, feature] = tree.threshold[node]
        is_leaf = tree.children_left < 0
        return cls(low[is_leaf], high[is_leaf], tree.value[is_leaf, 0, 0])

    def variance(self, columns: NDArray[np.bool_]) -> float:
        """Return the variance over the unit cube of the tree's mean over all columns but these."""
        mean = float(np.prod(self.high - self.low, axis=1) @ self.values)
        deviations = (self.values - mean) * np.prod((self.high - self.low)[:, ~columns], axis=1)
        # Two boxes meet in the product over the columns of the lengths in which they overlap.
        shared = np.ones((len(self.values), len(self.values)))
        for low, high in zip(self.low[:, columns].T, self.high[:, columns].T, strict=True):
            overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
            shared *= np.maximum(overlap, 0, out=overlap)
        return float(deviations @ shared @ deviations)
