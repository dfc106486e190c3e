"""The variants of a layout: valid layouts that keep its grid and differ from it in knobs that the sweep refines. Pure.

A choice (tuner.core.choices) is one knob, or several that only have a meaning together. A variant takes one option of
each choice; an option gives a value to each of the choice's knobs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.choices import CHOICES
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns, Texts
from tuner.core.layout import KNOBS, Layout
from tuner.core.stages import chunk_layers
from tuner.core.workload import Workload
from tuner.rules.recompute import MODULES
from tuner.rules.rule import Rule
from tuner.rules.validity import active_rules
from tuner.search.problem import Problem
from tuner.space.domain import Domain, Value, refined_domain
from tuner.space.placements import layer_placements

MOST_PRODUCTS: Final = 4096
"""Largest number of combinations of options that is enumerated completely. Assumed."""
MOST_CHANGES: Final = 3
"""Largest number of choices in which a variant differs from its layout if there are more than MOST_PRODUCTS
combinations. Assumed."""


@dataclass(frozen=True, slots=True)
class Variants:
    """The variants of one layout."""

    table: pd.DataFrame
    """One row per variant, columns as KNOBS; the layout itself is left out."""
    changes: int | None
    """Largest number of choices in which a variant differs from the layout; None if `table` holds all combinations."""


def variants_of(
    layout: Layout, problem: Problem, most_products: int = MOST_PRODUCTS, most_changes: int = MOST_CHANGES
) -> Variants:
    """Return the valid layouts that keep a layout's grid and differ from it in knobs that the problem refines.

    Args:
        layout: the layout to vary.
        problem: says which knobs are refined, and what is valid.
        most_products: as MOST_PRODUCTS.
        most_changes: as MOST_CHANGES.
    """
    domain = refined_values(layout, problem.workload, problem.cluster, problem.refined)
    rules = active_rules(problem.lifted)
    refined_choices = [[knob for knob in knobs if knob in domain] for knobs in CHOICES.values()]
    options = [_options(knobs, domain, layout, problem, rules) for knobs in refined_choices if knobs]
    options = [of_choice for of_choice in options if len(of_choice) > 1]
    counts = [len(of_choice) for of_choice in options]
    changes = None if prod(counts) <= most_products else most_changes
    picks = _picks(counts, changes or len(counts))
    picks = picks[_valid(_columns_of(picks, options, layout), rules, problem)]
    columns = {
        knob: pd.Categorical(values) if values.dtype.kind == "U" else values
        for knob, values in _columns_of(picks, options, layout).items()
    }
    return Variants(pd.DataFrame(columns), changes)


def refined_values(layout: Layout, workload: Workload, cluster: Cluster, knobs: Collection[str]) -> Domain:
    """Return the candidate values of each of `knobs` around a layout, the layout's own value first.

    Knobs that have no other candidate value are left out.
    """
    anywhere, here = dict(refined_domain(workload, cluster)), _values_of_stages(layout, workload)
    # The placements in `anywhere` are those for any pp; `here` has the placements for the layout's pp.
    del anywhere["pipeline_model_parallel_layout"]
    values = {
        knob: tuple(dict.fromkeys((getattr(layout, knob), *anywhere.get(knob, ()), *here.get(knob, ()))))
        for knob in KNOBS
        if knob in knobs
    }
    return {knob: candidates for knob, candidates in values.items() if len(candidates) > 1}


def _values_of_stages(layout: Layout, workload: Workload) -> Mapping[str, tuple[Value, ...]]:
    """Return candidate values that depend on the layout's pipeline stages, and single modules and pairs to recompute.

    A search over the whole space leaves out the pairs, because there are too many of them.
    """
    layers = max(int(chunk[0]) for chunk in chunk_layers(Columns.single(layout), workload))
    modules = ["none", *("+".join(names) for count in (1, 2) for names in combinations(MODULES, count))]
    return {
        "recompute_num_layers": tuple(sorted({0, 1, 2, layers // 4, layers // 2, 3 * layers // 4})),
        "recompute_modules": tuple(modules),
        "pipeline_model_parallel_layout": ("none", *layer_placements(workload, layout.pp, layout.vpp)),
    }


def _options(
    knobs: Sequence[str], domain: Domain, layout: Layout, problem: Problem, rules: Sequence[Rule]
) -> list[dict[str, Value]]:
    """Return the options of the choice made of `knobs`, the layout's own first.

    Options that break a rule with every option of the other choices are left out.
    """
    options = [dict(zip(knobs, values, strict=True)) for values in product(*(domain[knob] for knob in knobs))]
    other_knobs = domain.keys() - set(knobs)
    settled_rules = [rule for rule in rules if rule.knobs.isdisjoint(other_knobs)]
    picks = np.arange(len(options))[:, None]
    valid = _valid(_columns_of(picks, [options], layout), settled_rules, problem)
    valid[0] = True
    return [option for option, is_valid in zip(options, valid, strict=True) if is_valid]


def _valid(columns: Mapping[str, NDArray[Any]], rules: Sequence[Rule], problem: Problem) -> NDArray[np.bool_]:
    """Return which layouts, given as one array per knob, break none of the rules, of shape [layouts]."""
    texts = {knob: values for knob, values in columns.items() if values.dtype.kind == "U"}
    encoded = Columns({**columns, **{knob: _texts(values) for knob, values in texts.items()}})
    rows = len(next(iter(columns.values())))
    valid = np.ones(rows, dtype=np.bool_)
    for rule in rules:
        valid &= rule.mask(encoded, problem.workload, problem.cluster, rows)
    return valid


def _texts(values: NDArray[np.str_]) -> Texts:
    categories, codes = np.unique(values, return_inverse=True)
    return Texts(codes.astype(np.int8), categories.tolist())


def _picks(counts: Sequence[int], changes: int) -> NDArray[np.int64]:
    """Return every way to change 1 to `changes` choices.

    Args:
        counts: the number of options of each choice; option 0 is the layout's own.
        changes: the largest number of choices that take another option than 0.

    Returns:
        The index of each choice's option, of shape [ways, choices].
    """
    picks = []
    for changed in range(1, min(changes, len(counts)) + 1):
        for choices in combinations(range(len(counts)), changed):
            ways = np.array(list(product(*(range(1, counts[choice]) for choice in choices))))
            rows = np.zeros((len(ways), len(counts)), dtype=np.int64)
            rows[:, choices] = ways
            picks.append(rows)
    return np.concatenate(picks) if picks else np.zeros((0, len(counts)), dtype=np.int64)


def _columns_of(
    picks: NDArray[np.int64], options: Sequence[Sequence[Mapping[str, Value]]], layout: Layout
) -> dict[str, NDArray[Any]]:
    """Return the layouts that take these options and are `layout` otherwise, as one array per knob.

    Args:
        picks: the index of each choice's option, of shape [layouts, choices].
        options: the options of each choice.
        layout: gives the values of all other knobs.
    """
    columns: dict[str, NDArray[Any]] = {knob: np.full(len(picks), getattr(layout, knob)) for knob in KNOBS}
    for choice, of_choice in enumerate(options):
        for knob in of_choice[0]:
            columns[knob] = np.array([option[knob] for option in of_choice])[picks[:, choice]]
    return columns
