"""Which choices mattered in a sweep: their shares of the variance of its measured step times."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from tuner.core.choices import CHOICES, value_of
from tuner.core.layout import Layout

FEWEST_TRIALS: Final = 8
"""Fewest trials that shares are computed from. Assumed: with three or four points per choice, a forest of trees splits
on noise."""


def importances(layouts: Sequence[Layout], step_time_ms: Sequence[float]) -> dict[str, float]:
    """Return the share of each choice that varied, largest first; the shares sum to 1.

    The shares come from a functional ANOVA on log(step time) of the completed trials, computed by Optuna (Hutter, Hoos
    and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance"). They describe the layouts
    that were tried, not the space: no sampler draws the space evenly. The result is empty for fewer trials than
    FEWEST_TRIALS, or if nothing varied.

    Args:
        layouts: the layouts of the completed trials.
        step_time_ms: the measured step time of each of these trials.
    """
    values = [{choice: value_of(choice, layout) for choice in CHOICES} for layout in layouts]
    space: dict[str, BaseDistribution] = {
        choice: CategoricalDistribution(sorted(taken))
        for choice in CHOICES
        if len(taken := {value[choice] for value in values}) > 1
    }
    if len(layouts) < FEWEST_TRIALS or not space or np.ptp(step_time_ms) == 0:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials(
        [
            create_trial(
                value=float(np.log(ms)),
                params={choice: value[choice] for choice in space},
                distributions=space,
            )
            for value, ms in zip(values, step_time_ms, strict=True)
        ]
    )
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {choice: float(share) for choice, share in shares.items()}
