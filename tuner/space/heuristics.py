"""The published heuristics as seeds: the rows of the layout table nearest to what the guide says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.layout import DEFAULTS, KNOBS, Layout
from tuner.core.workload import Workload
from tuner.rules.validity import RULES, broken_rules
from tuner.space.advice import advice_for
from tuner.space.guide import read_guide
from tuner.space.table import layout_at

GRID_WEIGHTS: Mapping[str, float] = {"tp": 2.0, "pp": 1.0, "cp": 1.0, "ep": 1.0, "etp": 4.0}
"""How much a doubling or halving of each size counts when the nearest layout is chosen. Assumed: the guide scales by
PP, EP and CP, sizes TP by the model and the NVLink domain, and hardly ever uses ETP."""

SHAPE_SIZES = ("vpp", "micro_batch_size")
"""The sizes outside the device grid that a seed asks for."""
SHAPE_CHOICES = ("sp", "recompute_granularity")
"""The other knobs outside the device grid that a seed asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """A layout to try before the search, since a published heuristic leads to it."""

    layout: Layout
    """The layout, which is a row of the table."""
    row: int
    """The row's label in the table's index."""
    source: str
    """The guide's section and row, and `+` what the sequence length adds.

    Several sources that lead to one layout are joined by `; `. A source whose layout had to move is marked `(moved)`.
    """
    note: str
    """How the layout of the first source had to move, and whether it lacks virtual stages; empty if neither."""


def seeds(workload: Workload, cluster: Cluster, table: pd.DataFrame) -> tuple[Seed, ...]:
    """Return the guide's choices for `workload` on `cluster` as different rows of `table`, best first.

    `table` has one column per knob (`KNOBS`) and one valid layout per row. If it lacks a layout, the nearest takes its
    place, and the note says so. An empty table gives no seeds. The order is that of `advice_for`.
    """
    if table.empty:
        return ()
    grids = table[list(GRID_WEIGHTS)].drop_duplicates()
    unasked = _unasked_knobs(table)
    seed_of_row: dict[int, Seed] = {}
    for advice in advice_for(workload, cluster, read_guide()):
        position = _nearest(table, grids, unasked, advice.layout)
        layout, row = layout_at(table, position), int(table.index[position])
        moved = _moved_knobs(advice.layout, layout)
        source = advice.source + (" (moved)" if moved else "")
        note = _note(advice.layout, layout, moved, workload, cluster)
        seed = seed_of_row.get(row, Seed(layout=layout, row=row, source=source, note=note))
        sources = dict.fromkeys([*seed.source.split("; "), source])
        seed_of_row[row] = replace(seed, source="; ".join(sources))
    return tuple(seed_of_row.values())


def _unasked_knobs(table: pd.DataFrame) -> list[str]:
    """Return the knobs that no seed asks for and that differ between rows of the table."""
    asked = {*GRID_WEIGHTS, *SHAPE_SIZES, *SHAPE_CHOICES}
    return [name for name in KNOBS if name not in asked and (table[name] != table[name].iloc[0]).any()]


def _nearest(table: pd.DataFrame, grids: pd.DataFrame, unasked: Sequence[str], wanted: Layout) -> int:
    """Return the position in `table` of the layout nearest to `wanted`.

    First the device grid counts (`grids` holds each grid of the table once): the squared doublings between the sizes,
    weighted and summed. Squares spread a move over the sizes instead of putting it on one. Then it counts whether the
    layout interleaves, then the rest of the schedule and the recompute, and then how few of the `unasked` knobs differ
    from their default. Ties go to fewer pipeline stages, then to less TP, CP and EP, and then to the first row.
    """
    apart = np.zeros(len(grids))
    for name, weight in GRID_WEIGHTS.items():
        apart += weight * _doublings(grids[name], getattr(wanted, name)) ** 2
    ties = [grids[name].to_numpy() for name in ("etp", "ep", "cp", "tp", "pp")]
    nearest_grid = grids.iloc[int(np.lexsort((*ties, apart.round(9)))[0])]
    on_grid = np.logical_and.reduce([table[name].to_numpy() == nearest_grid[name] for name in GRID_WEIGHTS])
    positions = np.flatnonzero(on_grid)
    return int(positions[_nearest_on_grid(table.iloc[positions], unasked, wanted)])


def _nearest_on_grid(rows: pd.DataFrame, unasked: Sequence[str], wanted: Layout) -> int:
    """Return the position of the row nearest to `wanted` among the rows of one device grid."""
    interleaves_otherwise = (rows["vpp"] > 1).to_numpy() != (wanted.vpp > 1)
    apart = np.zeros(len(rows))
    for name in SHAPE_SIZES:
        apart += _doublings(rows[name], getattr(wanted, name)) ** 2
    for name in SHAPE_CHOICES:
        apart += (rows[name] != getattr(wanted, name)).to_numpy()
    return int(np.lexsort((_off_default(rows, unasked), apart.round(9), interleaves_otherwise))[0])


def _doublings(sizes: "pd.Series[int]", wanted: int) -> NDArray[np.float64]:
    """Return how many doublings lie between each size and the wanted one."""
    return np.abs(np.log2(sizes.to_numpy(dtype=np.float64)) - log2(wanted))


def _off_default(rows: pd.DataFrame, knobs: Sequence[str]) -> NDArray[np.float64]:
    """Return how many of the knobs differ from their default, one number per row."""
    count = np.zeros(len(rows))
    for name in knobs:
        count += (rows[name] != DEFAULTS[name]).to_numpy()
    # The last stage also holds the output layer and the loss, so it is better shortened than the first.
    return count + 0.5 * (rows["num_layers_in_first_pipeline_stage"] != 0).to_numpy()


def _moved_knobs(wanted: Layout, layout: Layout) -> frozenset[str]:
    """Return the knobs of the guide's rows in which two layouts differ."""
    return frozenset(name for name in (*GRID_WEIGHTS, "sp") if getattr(wanted, name) != getattr(layout, name))


def _note(wanted: Layout, layout: Layout, moved: frozenset[str], workload: Workload, cluster: Cluster) -> str:
    """Return how a layout moved, the rule that made it move, and whether it lacks virtual stages."""
    # The guide asks for virtual stages where they fit, and names no number.
    lacks_virtual_stages = wanted.vpp > 1 and layout.pp > 1 and layout.vpp == 1
    flat = f"no virtual stages fit pp={layout.pp} here" if lacks_virtual_stages else ""
    if not moved:
        return flat
    knobs_of_rule = {rule.id: rule.knobs for rule in RULES}
    violations = broken_rules(wanted, workload, cluster)
    cause = next((violation for violation in violations if knobs_of_rule[violation.rule] & moved), None)
    reason = cause.message.split(": ")[0] if cause else "it is not among the layouts searched"
    move = f"guide says {_sizes(wanted)}, but {reason}: moved to {_sizes(layout)}, the nearest valid"
    return f"{move}; {flat}" if flat else move


def _sizes(layout: Layout) -> str:
    """Return a layout's grid in words: tp and pp, the other sizes above 1, and sp if it is on."""
    sizes = [f"{name}={getattr(layout, name)}" for name in ("tp", "pp")]
    sizes += [f"{name}={getattr(layout, name)}" for name in ("cp", "ep", "etp") if getattr(layout, name) > 1]
    return " ".join([*sizes, "sp"] if layout.sp else sizes)
