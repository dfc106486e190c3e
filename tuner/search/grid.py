"""The grid of a search: the valid layouts that it measures first, before it refines the best of them. Pure.

The grid of one layout is its values of all knobs that the refinement does not vary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.choices import CHOICES
from tuner.core.columns import Columns
from tuner.core.layout import DEFAULTS
from tuner.rules.validity import active_rules
from tuner.search.problem import Problem
from tuner.space.domain import Value
from tuner.space.enumeration import Space, enumerate_layouts

GRID_SHARE: Final = 0.6
"""Share of the search's budget that the grid may use. Assumed: a wrong grid costs more than a wrong detail."""


def grid_space(problem: Problem) -> Space:
    """Return the valid layouts of a problem's domain, with details of the baseline.

    The details are the baseline's values of the knobs that the refinement would vary; a layout takes them if it stays
    valid. Without them, only the grid of the user's recipe would have the details that the recipe was tuned with, and
    it would win because of these details.
    """
    space = enumerate_layouts(problem.workload, problem.cluster, problem.domain, lifted=problem.lifted)
    table = space.table
    if problem.baseline is None:
        return space
    for knobs in CHOICES.values():
        refined = [knob for knob in knobs if knob in problem.refined and knob not in problem.domain]
        details = {knob: getattr(problem.baseline, knob) for knob in refined}
        if any(value != DEFAULTS[knob] for knob, value in details.items()):
            table = _with_valid_details(table, details, problem)
    return replace(space, table=table)


def _with_valid_details(table: pd.DataFrame, details: Mapping[str, Value], problem: Problem) -> pd.DataFrame:
    """Return the table with the values of `details` in every row that stays valid with them, and all other rows."""
    changed = table.assign(**{knob: np.full(len(table), value) for knob, value in details.items()})
    columns, valid = Columns.of(changed), np.ones(len(table), dtype=np.bool_)
    for rule in active_rules(problem.lifted):
        if not rule.knobs.isdisjoint(details):
            valid &= rule.mask(columns, problem.workload, problem.cluster, len(table))
    values = {knob: np.where(valid, value, table[knob].to_numpy()) for knob, value in details.items()}
    return table.assign(**{knob: _as_column(values[knob], table[knob].dtype) for knob in details})


def _as_column(values: NDArray[Any], dtype: Any) -> Any:
    """Return values as the table holds them: texts as categories, sizes and switches in the column's dtype."""
    return pd.Categorical(values) if isinstance(dtype, pd.CategoricalDtype) else values.astype(dtype)
