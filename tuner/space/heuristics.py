"""Seeds: the rows of the table of layouts nearest to what the parallelism guide (tuner/space/guide.py) recommends."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import DEFAULTS, KNOBS, Layout
from tuner.core.workload import Workload
from tuner.rules.validity import RULES, broken_rules
from tuner.space.advice import advice_for
from tuner.space.guide import read_guide
from tuner.space.table import layout_at

GRID_WEIGHTS: Mapping[str, float] = {"tp": 2.0, "pp": 1.0, "cp": 1.0, "ep": 1.0, "etp": 4.0}
"""Weight of a doubling or halving of each parallel size in the distance between two layouts. Assumed: the parallelism
guide scales by PP, EP and CP, sizes TP by the model and the NVLink domain, and hardly ever uses ETP."""

SHAPE_SIZES = ("vpp", "micro_batch_size")
"""The knobs with integer values, other than parallel sizes, that a layout of the parallelism guide sets."""
SHAPE_CHOICES = ("sp", "recompute_granularity")
"""The knobs without integer values that a layout of the parallelism guide sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """A layout that is tried before the search because a published heuristic leads to it."""

    layout: Layout
    """The layout, which is a row of the table."""
    row: int
    """The row's label in the table's index."""
    source: str
    """The section and the row of the parallelism guide that lead to the layout; if the sequence length changed it, also
    a `+` and the row for that length.

    Several sources that lead to one layout are joined by `; `. A source is marked `(moved)` if the layout that it
    recommends is not in the table, and this layout is the nearest.
    """
    note: str
    """How this layout differs from the one that the first source recommends, and whether it lacks virtual stages; empty
    if neither applies."""


def seeds(workload: Workload, cluster: Cluster, table: pd.DataFrame) -> tuple[Seed, ...]:
    """Return the rows of `table` nearest to the layouts that the parallelism guide recommends, best first, each once.

    `table` has one column per knob (`KNOBS`) and one valid layout per row. If it lacks a recommended layout, the seed's
    note says so. An empty table gives no seeds. The order is that of `advice_for`.
    """
    if table.empty:
        return ()
    columns, grids = Columns.of(table), table[list(GRID_WEIGHTS)].drop_duplicates()
    off_default = _off_default(columns, len(table))
    seed_of_row: dict[int, Seed] = {}
    for advice in advice_for(workload, cluster, read_guide()):
        position = _nearest(columns, grids, off_default, advice.layout)
        row = int(table.index[position])
        seed = seed_of_row.get(row)
        layout = seed.layout if seed else layout_at(table, position)
        moved = _moved_knobs(advice.layout, layout)
        source = advice.source + (" (moved)" if moved else "")
        if seed is None:
            note = _note(advice.layout, layout, moved, workload, cluster)
            seed_of_row[row] = Seed(layout=layout, row=row, source=source, note=note)
        elif source not in seed.source.split("; "):
            seed_of_row[row] = replace(seed, source=f"{seed.source}; {source}")
    return tuple(seed_of_row.values())


def _nearest(columns: Columns, grids: pd.DataFrame, off_default: NDArray[np.float64], wanted: Layout) -> int:
    """Return the position in the table of the layout nearest to `wanted`.

    The parallel sizes count first: their distances in doublings, squared, weighted by GRID_WEIGHTS and summed. Squares
    spread a difference over several sizes instead of putting it on one. Among equally near sizes, fewer pipeline stages
    win, then less TP, CP and EP. Of the layouts with the nearest sizes, the nearest is the one that interleaves or not
    as `wanted` does, then the one with the smallest difference in SHAPE_SIZES and SHAPE_CHOICES, then the one with the
    fewest other knobs that differ from their default.

    Args:
        columns: The columns of the table.
        grids: Every combination of parallel sizes in the table once, one column per name in GRID_WEIGHTS.
        off_default: The result of `_off_default`.
        wanted: The layout that the parallelism guide recommends.
    """
    apart = np.zeros(len(grids))
    for name, weight in GRID_WEIGHTS.items():
        apart += weight * _doublings(grids[name].to_numpy(), getattr(wanted, name)) ** 2
    ties = [grids[name].to_numpy() for name in ("etp", "ep", "cp", "tp", "pp")]
    nearest_grid = grids.iloc[int(np.lexsort((*ties, apart.round(9)))[0])]
    on_grid = np.logical_and.reduce([columns.column(name) == nearest_grid[name] for name in GRID_WEIGHTS])
    positions = np.flatnonzero(on_grid)
    interleaves_otherwise = (columns.column("vpp")[positions] > 1) != (wanted.vpp > 1)
    shape = np.zeros(len(positions))
    for name in SHAPE_SIZES:
        shape += _doublings(columns.column(name)[positions], getattr(wanted, name)) ** 2
    for name in SHAPE_CHOICES:
        shape += _differs(columns, name, getattr(wanted, name))[positions]
    order = np.lexsort((off_default[positions], shape.round(9), interleaves_otherwise))
    return int(positions[order[0]])


def _doublings(sizes: NDArray[np.integer], wanted: int) -> NDArray[np.float64]:
    """Return how many doublings or halvings lead from `wanted` to each size."""
    return np.abs(np.log2(sizes.astype(np.float64)) - log2(wanted))


def _differs(columns: Columns, knob: str, value: bool | int | str) -> Bools:
    """Return a mask of the rows where `knob` has another value than `value`."""
    if isinstance(value, str):
        return ~columns.among(knob, value)
    differs: Bools = columns.column(knob) != value
    return differs


def _off_default(columns: Columns, rows: int) -> NDArray[np.float64]:
    """Return how many knobs that no layout of the guide sets differ from their default, one number per row.

    A stated number of layers in the first stage counts as 1.5 knobs.
    """
    asked = {*GRID_WEIGHTS, *SHAPE_SIZES, *SHAPE_CHOICES}
    count = np.zeros(rows)
    for knob in KNOBS:
        if knob not in asked:
            count += _differs(columns, knob, DEFAULTS[knob])
    # The last stage also holds the output layer and the loss, so it is better shortened than the first.
    return count + 0.5 * _differs(columns, "num_layers_in_first_pipeline_stage", 0)


def _moved_knobs(wanted: Layout, layout: Layout) -> frozenset[str]:
    """Return the knobs in which two layouts differ, out of the parallel sizes and sequence parallelism."""
    return frozenset(name for name in (*GRID_WEIGHTS, "sp") if getattr(wanted, name) != getattr(layout, name))


def _note(wanted: Layout, layout: Layout, moved: frozenset[str], workload: Workload, cluster: Cluster) -> str:
    """Return a text for `Seed.note`: how `layout` differs from `wanted`, why, and whether it lacks virtual stages."""
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
    """Return the parallel sizes of a layout as a text: tp and pp, the other sizes above 1, and sp if it is on."""
    sizes = [f"{name}={getattr(layout, name)}" for name in ("tp", "pp")]
    sizes += [f"{name}={getattr(layout, name)}" for name in ("cp", "ep", "etp") if getattr(layout, name) > 1]
    return " ".join([*sizes, "sp"] if layout.sp else sizes)
