"""The table of valid layouts: the row of a layout, the layout of a row, and sizes that follow from a row's knobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import (
    KNOBS,
    Layout,
    data_parallel_size,
    expert_data_parallel_size,
    layout_from,
    num_microbatches,
)
from tuner.core.workload import Workload


def find_row(table: pd.DataFrame, layout: Layout) -> int | None:
    """Return the position of a layout in the table, or None if it is not in the table."""
    mask = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        mask &= table[knob].to_numpy() == getattr(layout, knob)
    positions = np.flatnonzero(mask)
    return int(positions[0]) if len(positions) else None


def layout_at(table: pd.DataFrame, row: int) -> Layout:
    """Return the layout at a position of the table."""
    return layout_from({knob: table[knob].iloc[row] for knob in KNOBS})


def with_row(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return a table that contains `layout`: `table` itself, or a copy with the layout appended as its last row."""
    if find_row(table, layout) is not None:
        return table
    row = pd.DataFrame([{knob: getattr(layout, knob) for knob in table.columns}])
    joined = pd.concat([table, row], ignore_index=True)
    return joined.astype(
        {name: dtype for name, dtype in table.dtypes.items() if not isinstance(dtype, pd.CategoricalDtype)}
    )


def with_derived(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> pd.DataFrame:
    """Return the table with the columns dp, edp and num_microbatches, which follow from the knobs of a row."""
    columns = Columns.of(table)
    dp = data_parallel_size(cluster.world_size, columns["tp"], columns["pp"], columns["cp"])
    edp = expert_data_parallel_size(cluster.world_size, columns["pp"], columns["ep"], columns["etp"])
    micro_batches = num_microbatches(workload.global_batch_size, columns["micro_batch_size"], dp)
    return table.assign(
        dp=dp.astype(np.int32), edp=edp.astype(np.int32), num_microbatches=micro_batches.astype(np.int32)
    )


@dataclass(frozen=True, slots=True)
class _IndexedColumn:
    knob: str
    values: NDArray[Any]
    """One value per row; for a text, its code."""
    codes: Mapping[str, int] | None
    """The code of each text; None if the column has integers or bools."""


class RowIndex:
    """Finds many rows of one table of layouts without converting the table's columns each time."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._columns = [_indexed(knob, table[knob]) for knob in KNOBS]

    def find(self, layout: Layout) -> int | None:
        """Return the position of a layout in the table, or None if it is not in the table."""
        rows: NDArray[np.intp] | None = None
        for column in self._columns:
            value = getattr(layout, column.knob)
            code = value if column.codes is None else column.codes.get(value, -1)
            left = column.values if rows is None else column.values[rows]
            matches = np.flatnonzero(left == code)
            rows = matches if rows is None else rows[matches]
            if not len(rows):
                return None
        return None if rows is None else int(rows[0])


def _indexed(knob: str, column: "pd.Series[Any]") -> _IndexedColumn:
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = {text: code for code, text in enumerate(column.cat.categories)}
        return _IndexedColumn(knob, column.cat.codes.to_numpy(), codes)
    return _IndexedColumn(knob, column.to_numpy(), None)
