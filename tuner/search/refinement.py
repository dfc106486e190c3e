"""The stages of a default search: the grid first, then every other knob around the few best layouts. Pure.

All knobs together would be a space of billions of layouts, most of them a slow grid with its details polished. So the
first stage searches the grid (tuner.space.enumeration), and the second one keeps the grid of the best measured
layouts and varies the rest. Which layouts these are is written into the trials themselves, so that a sweep that is
resumed goes on with the same rows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import union_categoricals

from tuner.analysis.answer import candidates, ruled_out
from tuner.analysis.centres import refinement_centres
from tuner.analysis.drift import drift
from tuner.core.choices import CHOICES
from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, KNOBS, Layout, layout_from
from tuner.core.stages import chunk_layers
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.implementation import implementation_of
from tuner.predict.time.step import step_time_ms
from tuner.rules import Columns, Rule, Texts, active_rules
from tuner.rules.recompute import MODULES
from tuner.search.problem import Problem
from tuner.space.enumeration import Domain, Space, Value, enumerate_layouts, layer_placements, refined_domain
from tuner.trial.finished import FinishedTrial

FIRST_SHARE: Final = 0.6
"""Of what the search may use, for the first stage: a wrong grid costs more than a wrong detail."""
AROUND: Final = 3
"""Layouts that the second stage varies, each of another grid: what else two of one grid differ in varies anyway."""
MOST_PRODUCTS: Final = 4096
"""Combinations around one layout that are all looked at."""
MOST_CHANGES: Final = 3
"""Where there are more: choices in which a layout differs from the one that it lies around."""


def first_stage(problem: Problem) -> Space:
    """The valid layouts of a sweep's domain, with the baseline's details where a second stage would refine these.

    Without them a recipe's own grid alone would have what the recipe was polished with, and win by that.
    """
    space = enumerate_layouts(problem.workload, problem.cluster, problem.domain, lifted=problem.lifted)
    table = space.table
    if problem.baseline is None:
        return space
    for knobs in CHOICES.values():
        own = [knob for knob in knobs if knob in problem.refined and knob not in problem.domain]
        details = {knob: getattr(problem.baseline, knob) for knob in own}
        if any(value != DEFAULTS[knob] for knob, value in details.items()):
            table = _where_valid(table, details, problem)
    return replace(space, table=table)


def _where_valid(table: pd.DataFrame, details: Mapping[str, Value], problem: Problem) -> pd.DataFrame:
    """The valid layouts with these values, each as it was where it would not be valid with them."""
    changed = table.assign(**{knob: np.full(len(table), value) for knob, value in details.items()})
    columns, kept = Columns.of(changed), np.ones(len(table), dtype=np.bool_)
    for rule in active_rules(problem.lifted):
        if not rule.knobs.isdisjoint(details):
            kept &= rule.mask(columns, problem.workload, problem.cluster, len(table))
    found = {knob: np.where(kept, value, table[knob].to_numpy()) for knob, value in details.items()}
    return table.assign(**{knob: _column(values, table[knob].dtype) for knob, values in found.items()})


def _column(values: NDArray[Any], kind: Any) -> Any:
    """Texts as categories, sizes and switches as the table holds them."""
    return pd.Categorical(values) if isinstance(kind, pd.CategoricalDtype) else values.astype(kind)


def refinements(layout: Layout, workload: Workload, cluster: Cluster, knobs: Collection[str]) -> Domain:
    """Candidate values of `knobs` around a layout, its own first; the knobs that could only repeat it left out."""
    every, own = dict(refined_domain(workload, cluster)), _own_values(layout, workload)
    del every["pipeline_model_parallel_layout"]  # those of every pp
    found = {
        knob: tuple(dict.fromkeys((getattr(layout, knob), *every.get(knob, ()), *own.get(knob, ()))))
        for knob in KNOBS
        if knob in knobs
    }
    return {knob: choices for knob, choices in found.items() if len(choices) > 1}


@dataclass(frozen=True, slots=True)
class Around:
    """The valid layouts around one."""

    table: pd.DataFrame
    """One row a layout, columns as KNOBS, the one in the middle left out."""
    changes: int | None
    """In how many choices they differ from it at most; None where every combination was looked at."""


def around(layout: Layout, problem: Problem) -> Around:
    """The valid layouts that keep a layout's grid, and differ from it in the knobs that the sweep refines."""
    domain = refinements(layout, problem.workload, problem.cluster, problem.refined)
    rules = active_rules(problem.lifted)
    together = [[knob for knob in knobs if knob in domain] for knobs in CHOICES.values()]
    options = [_options(knobs, domain, layout, problem, rules) for knobs in together if knobs]
    options = [own for own in options if len(own) > 1]
    counts = [len(own) for own in options]
    changes = None if prod(counts) <= MOST_PRODUCTS else MOST_CHANGES
    chosen = _chosen(counts, changes or len(counts))
    chosen = chosen[_keeping(_arrays(chosen, options, layout), rules, problem)]
    table = {
        knob: pd.Categorical(values) if values.dtype.kind == "U" else values
        for knob, values in _arrays(chosen, options, layout).items()
    }
    return Around(pd.DataFrame(table), changes)


def refined_rows(table: pd.DataFrame, layouts: Sequence[Layout], problem: Problem) -> pd.DataFrame:
    """The valid layouts around some, each once, that the table does not hold."""
    fresh = [_new(around(layout, problem).table, table, layout, problem.refined) for layout in layouts]
    return _joined(fresh).drop_duplicates(ignore_index=True) if fresh else table.iloc[:0]


def with_refinements(
    table: pd.DataFrame, layouts: Sequence[Layout], problem: Problem, least_fit: float = 0.0
) -> pd.DataFrame:
    """The table and, behind it, the layouts around some that it does not hold; itself where there are none.

    Args:
        table: valid layouts, columns as KNOBS.
        layouts: what the second stage lies around.
        problem: what the search varies.
        least_fit: the least probability that a layout fits, before any trial.
    """
    rows = refined_rows(table, layouts, problem)
    if least_fit and len(rows):
        rows = rows[fit_probabilities(rows, problem.workload, problem.cluster) >= least_fit]
    if rows.empty:
        return table
    numbers = {name: kind for name, kind in table.dtypes.items() if pd.api.types.is_numeric_dtype(kind)}
    return _joined([table, rows.astype(numbers)])


def searched_table(problem: Problem, trials: Sequence[FinishedTrial]) -> pd.DataFrame:
    """Every valid layout of the stages that a sweep's trials came to, whether it fits or not."""
    table = first_stage(problem).table
    layouts = {trial.number: trial.layout for trial in trials}
    return with_refinements(
        table, [layouts[number] for number in refinement_centres(trials) if number in layouts], problem
    )


def predicted_best(table: pd.DataFrame, problem: Problem) -> list[Layout]:
    """What the second stage would lie around, if every trial measured what is predicted."""
    workload, cluster = problem.workload, problem.cluster
    predicted_ms = step_time_ms(table, workload, cluster, implementation_of(cluster))
    # A row that fits every other time costs two launches.
    expected_ms = predicted_ms / np.maximum(fit_probabilities(table, workload, cluster), 1e-12)
    grid = [knob for knob in KNOBS if knob not in problem.refined]
    ordered = table.iloc[np.argsort(expected_ms, kind="stable")].drop_duplicates(grid)
    best = ordered.head(AROUND)
    return [layout_from({knob: best[knob].iloc[row] for knob in KNOBS}) for row in range(len(best))]


def best_trials(rows: Sequence[FinishedTrial], problem: Problem) -> tuple[int, ...]:
    """The trials that the second stage is to vary: of the fastest grids measured, each one's fastest layout."""
    found: dict[tuple[Value, ...], int] = {}
    for one in candidates(rows, drift(rows), ruled_out(rows)):
        grid = tuple(getattr(one.row.layout, knob) for knob in KNOBS if knob not in problem.refined)
        found.setdefault(grid, one.row.number)
    return tuple(found.values())[:AROUND]


def middles(numbers: Sequence[int], layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts of these trials; raises InputError where there are no such trials."""
    if numbers and max(numbers) >= len(layouts):
        raise InputError(
            f"key 'around': the second stage lies around trial {max(numbers)}, but there are {len(layouts)} trials; "
            "were folders removed?"
        )
    return [layouts[number] for number in numbers]


def _own_values(layout: Layout, workload: Workload) -> Mapping[str, tuple[Value, ...]]:
    """More values than a whole space can take, and those that only this layout's stages give a meaning."""
    layers = max(int(part[0]) for part in chunk_layers(Columns.single(layout), workload))
    modules = ["none", *("+".join(names) for count in (1, 2) for names in combinations(MODULES, count))]
    return {
        "recompute_num_layers": tuple(sorted({0, 1, 2, layers // 4, layers // 2, 3 * layers // 4})),
        "recompute_modules": tuple(modules),
        "pipeline_model_parallel_layout": ("none", *layer_placements(workload, layout.pp, layout.vpp)),
    }


def _options(
    knobs: Sequence[str], domain: Domain, layout: Layout, problem: Problem, rules: Sequence[Rule]
) -> list[dict[str, Value]]:
    """What a choice may take: its knobs' values by name, the layout's own first.

    Left out is what breaks a rule however the other choices fall.
    """
    found = [dict(zip(knobs, values, strict=True)) for values in product(*(domain[knob] for knob in knobs))]
    others = domain.keys() - set(knobs)
    own = [rule for rule in rules if rule.knobs.isdisjoint(others)]
    kept = _keeping(_arrays(np.arange(len(found))[:, None], [found], layout), own, problem)
    kept[0] = True
    return [option for option, keeps in zip(found, kept, strict=True) if keeps]


def _keeping(
    arrays: Mapping[str, NDArray[Any]], rules: Sequence[Rule], problem: Problem
) -> NDArray[np.bool_]:
    """Which of the layouts keep these rules."""
    texts = {knob: values for knob, values in arrays.items() if values.dtype.kind == "U"}
    columns = Columns({**arrays, **{knob: _texts(values) for knob, values in texts.items()}})
    rows = len(next(iter(arrays.values())))
    kept = np.ones(rows, dtype=np.bool_)
    for rule in rules:
        kept &= rule.mask(columns, problem.workload, problem.cluster, rows)
    return kept


def _texts(values: NDArray[np.str_]) -> Texts:
    categories, codes = np.unique(values, return_inverse=True)
    return Texts(codes.astype(np.int8), categories.tolist())


def _chosen(counts: Sequence[int], changes: int) -> NDArray[np.int64]:
    """Every way to leave 0 in at most so many places: which option of each choice a layout takes, one row each."""
    rows = []
    for changed in range(1, min(changes, len(counts)) + 1):
        for places in combinations(range(len(counts)), changed):
            ways = np.array(list(product(*(range(1, counts[place]) for place in places))))
            row = np.zeros((len(ways), len(counts)), dtype=np.int64)
            row[:, places] = ways
            rows.append(row)
    return np.concatenate(rows) if rows else np.zeros((0, len(counts)), dtype=np.int64)


def _arrays(
    chosen: NDArray[np.int64], options: Sequence[Sequence[Mapping[str, Value]]], layout: Layout
) -> dict[str, NDArray[Any]]:
    """Every knob of the layouts that take these options, and are the given one otherwise."""
    arrays: dict[str, NDArray[Any]] = {knob: np.full(len(chosen), getattr(layout, knob)) for knob in KNOBS}
    for place, own in enumerate(options):
        for knob in own[0]:
            arrays[knob] = np.array([option[knob] for option in own])[chosen[:, place]]
    return arrays


def _new(rows: pd.DataFrame, table: pd.DataFrame, layout: Layout, refined: Collection[str]) -> pd.DataFrame:
    """The rows that the table does not hold. Only its rows of the same grid can be the same."""
    same = np.ones(len(table), dtype=np.bool_)
    for knob in KNOBS:
        if knob not in refined:
            same &= table[knob].to_numpy() == getattr(layout, knob)
    known = table[same]
    repeated = pd.concat([known, rows], ignore_index=True).duplicated().to_numpy()
    return rows[~repeated[len(known) :]]


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables one after the other, texts kept as categories."""
    joined = pd.concat(tables, ignore_index=True)
    for knob in KNOBS:
        columns = [table[knob] for table in tables]
        if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
            joined[knob] = union_categoricals(columns)
    return joined
