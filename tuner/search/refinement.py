"""The refinement of a default search: every other knob is varied around the few best layouts of the grid. Pure.

All knobs together would span billions of layouts, most of them a slow grid with its details polished. So the search
measures its grid first (tuner.search.grid). The refinement then takes the best measured layouts as centres, keeps their
grids, and varies the other knobs (tuner.search.variants). Every trial of the refinement records the trials of its
centres, so a resumed sweep searches the same rows.
"""

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from tuner.analysis.candidates import candidates, ruled_out
from tuner.analysis.centres import refinement_centres
from tuner.analysis.drift import drift
from tuner.core.layout import KNOBS, Layout, layout_from
from tuner.errors import InputError
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.time.step import step_time_ms
from tuner.search.grid import grid_space
from tuner.search.problem import Problem
from tuner.search.variants import variants_of
from tuner.space.domain import Value
from tuner.trial.finished import FinishedTrial

MAX_CENTRES: Final = 3
"""Largest number of centres. Assumed. Their grids differ, because two layouts with one grid have the same variants."""


def choose_centres(trials: Sequence[FinishedTrial], problem: Problem) -> tuple[int, ...]:
    """Return the numbers of the trials to centre the refinement on: the fastest trial of each of the fastest grids."""
    fastest_of_grid: dict[tuple[Value, ...], int] = {}
    for candidate in candidates(trials, drift(trials), ruled_out(trials)):
        grid = tuple(getattr(candidate.trial.layout, knob) for knob in KNOBS if knob not in problem.refined)
        fastest_of_grid.setdefault(grid, candidate.trial.number)
    return tuple(fastest_of_grid.values())[:MAX_CENTRES]


def centre_layouts(numbers: Sequence[int], layouts: Sequence[Layout]) -> list[Layout]:
    """Return the layouts of the trials with these numbers.

    Args:
        numbers: the trials that the refinement is centred on.
        layouts: the layouts of all trials, by number.

    Raises:
        InputError: if there is no trial with one of these numbers.
    """
    if numbers and max(numbers) >= len(layouts):
        raise InputError(
            f"key 'around': the refinement is centred on trial {max(numbers)}, but there are {len(layouts)} trials; "
            "were folders removed?"
        )
    return [layouts[number] for number in numbers]


def predicted_centres(table: pd.DataFrame, problem: Problem) -> list[Layout]:
    """Return the layouts that the refinement would be centred on if every trial measured its predicted step time."""
    workload, cluster = problem.workload, problem.cluster
    predicted_ms = step_time_ms(table, workload, cluster, implementation_of(cluster))
    # A row that fits with probability 1/2 costs two launches on average.
    expected_ms = predicted_ms / np.maximum(fit_probabilities(table, workload, cluster), 1e-12)
    grid = [knob for knob in KNOBS if knob not in problem.refined]
    ordered = table.iloc[np.argsort(expected_ms, kind="stable")].drop_duplicates(grid)
    best = ordered.head(MAX_CENTRES)
    return [layout_from({knob: best[knob].iloc[row] for knob in KNOBS}) for row in range(len(best))]


def searched_table(problem: Problem, trials: Sequence[FinishedTrial]) -> pd.DataFrame:
    """Return every valid layout that the search may choose from after these trials, whether it fits or not.

    These are the layouts of the grid, followed by the variants of the centres once the refinement has begun.
    """
    table = grid_space(problem).table
    layouts = {trial.number: trial.layout for trial in trials}
    centres = [layouts[number] for number in refinement_centres(trials) if number in layouts]
    return with_refinements(table, centres, problem)


def with_refinements(
    table: pd.DataFrame, centres: Sequence[Layout], problem: Problem, least_fit: float = 0.0
) -> pd.DataFrame:
    """Return the table, followed by the variants of the centres that it does not hold.

    If it holds all of them, the result is the table itself.

    Args:
        table: valid layouts, one row per layout, columns as KNOBS.
        centres: the layouts whose variants are appended.
        problem: says which knobs are refined.
        least_fit: least probability, before any trial, that a variant fits the GPU's memory.
    """
    rows = variant_rows(table, centres, problem)
    if least_fit and len(rows):
        rows = rows[fit_probabilities(rows, problem.workload, problem.cluster) >= least_fit]
    if rows.empty:
        return table
    numeric = {name: dtype for name, dtype in table.dtypes.items() if pd.api.types.is_numeric_dtype(dtype)}
    return _joined([table, rows.astype(numeric)])


def variant_rows(table: pd.DataFrame, centres: Sequence[Layout], problem: Problem) -> pd.DataFrame:
    """Return the variants of the centres that the table does not hold, each once."""
    new = [
        _new_rows(variants_of(centre, problem).table, table, centre, problem.refined) for centre in centres
    ]
    return _joined(new).drop_duplicates(ignore_index=True) if new else table.iloc[:0]


def _new_rows(
    variants: pd.DataFrame, table: pd.DataFrame, centre: Layout, refined: Collection[str]
) -> pd.DataFrame:
    """Return the variants that the table does not hold; only its rows with the centre's grid can equal a variant."""
    has_grid = np.ones(len(table), dtype=np.bool_)
    for knob in KNOBS:
        if knob not in refined:
            has_grid &= table[knob].to_numpy() == getattr(centre, knob)
    of_grid = table[has_grid]
    is_duplicate = pd.concat([of_grid, variants], ignore_index=True).duplicated().to_numpy()
    return variants[~is_duplicate[len(of_grid) :]]


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables, keeping texts as categories."""
    joined = pd.concat(tables, ignore_index=True)
    for knob in KNOBS:
        columns = [table[knob] for table in tables]
        if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
            joined[knob] = union_categoricals(columns)
    return joined
