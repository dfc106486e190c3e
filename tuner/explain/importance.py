"""Which choices mattered in a sweep: shares of the variance of its measured step times."""

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
"""Fewer say nothing: a forest of trees over three or four points a choice splits on noise."""


def importances(layouts: Sequence[Layout], step_time_ms: Sequence[float]) -> dict[str, float]:
    """The share of each choice that varied, the largest first; they sum to 1.

    Empty below FEWEST_TRIALS, or where nothing varied. Functional ANOVA on log(step time) of the completed trials
    (Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance"), by Optuna. It
    describes the layouts that were tried, which no sampler draws evenly: not the space.
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
