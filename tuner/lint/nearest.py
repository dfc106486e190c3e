"""Finds the valid layouts that differ least from a layout that is refused or does not fit."""

from collections.abc import Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, KNOBS, Layout, layout_from
from tuner.core.workload import Workload
from tuner.lint.verdict import LIKELY, NearLayout
from tuner.predict.feasibility import fit_probabilities
from tuner.rules.validity import RULES, broken_rules
from tuner.space.domain import Domain, search_domain
from tuner.space.enumeration import enumerate_layouts

NEAREST: Final = 3
"""The number of valid layouts that are proposed instead of a refused one. Assumed."""

_SIZES: Final = ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size")


def nearest_layouts(
    layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str] = frozenset()
) -> tuple[NearLayout, ...]:
    """Return up to `NEAREST` valid layouts that differ from a layout, nearest first, but likely to fit before others.

    The distance of two layouts is a sum over the knobs that differ: |log2(a / b)| for the values a and b of a degree of
    parallelism or of the micro-batch size, and 1 for any other knob.

    Args:
        layout: The layout to start from; it may be invalid.
        workload: The workload that it trains.
        cluster: The cluster on which it would run.
        lifted: Ids of rules not to apply.
    """
    domain = _neighbourhood(layout, workload, cluster, lifted)
    table = enumerate_layouts(workload, cluster, domain, lifted=lifted).table
    if table.empty:
        return ()
    distance: NDArray[np.float64] = np.zeros(len(table))
    for knob in KNOBS:
        values, wanted = table[knob].to_numpy(), getattr(layout, knob)
        distance += (
            np.abs(np.log2(values.astype(float) / wanted))
            if knob in _SIZES
            else np.asarray(values != wanted, dtype=float)
        )
    fits = fit_probabilities(table, workload, cluster)
    table, fits, distance = table[distance > 0], fits[distance > 0], distance[distance > 0]
    order = np.lexsort((distance, fits < LIKELY))[:NEAREST]
    return tuple(
        NearLayout(
            layout=layout_from({str(knob): value for knob, value in table.iloc[row].items()}),
            fits=float(fits[row]),
        )
        for row in order
    )


def _neighbourhood(layout: Layout, workload: Workload, cluster: Cluster, lifted: Collection[str]) -> Domain:
    """Return the values of every knob among which to search for a near layout.

    Every knob has the layout's own value. The degrees of parallelism, the micro-batch size, `sp` and the knobs of
    pipelining also have the values of a default search. A knob that a broken rule reads also has its default, or both
    values if it is a bool.
    """
    searched = search_domain(workload, cluster)
    searched_knobs = (*_SIZES, "sp", *(knob for knob in KNOBS if "pipeline" in knob))
    broken = {item.rule for item in broken_rules(layout, workload, cluster, lifted)}
    broken_knobs = {knob for rule in RULES if rule.id in broken for knob in rule.knobs}
    switches = {knob for knob in broken_knobs if isinstance(DEFAULTS[knob], bool)}
    return {
        **{knob: (getattr(layout, knob),) for knob in KNOBS},
        **{knob: _unique(getattr(layout, knob), DEFAULTS[knob]) for knob in broken_knobs - switches},
        **dict.fromkeys(switches, (False, True)),
        **{knob: _unique(getattr(layout, knob), *searched.get(knob, ())) for knob in searched_knobs},
        "overlap_p2p_comm": (False, True),
    }


def _unique(*values: object) -> tuple[object, ...]:
    return tuple(dict.fromkeys(values))
