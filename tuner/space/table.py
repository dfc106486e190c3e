"""The table of valid layouts: the row of a layout, the layout of a row, and sizes that follow from a row's knobs."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

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


def layouts_at(table: pd.DataFrame, rows: Sequence[int]) -> list[Layout]:
    """Return the layouts at several positions of the table, in their order."""
    records = table[list(KNOBS)].iloc[[*rows]].to_dict("records")
    return [layout_from({str(knob): value for knob, value in record.items()}) for record in records]


def with_row(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return a table that contains `layout`: `table` itself, or a copy with the layout appended as its last row."""
    if find_row(table, layout) is not None:
        return table
    row = pd.DataFrame([{knob: getattr(layout, knob) for knob in table.columns}])
    joined = pd.concat([table, row], ignore_index=True)
    return joined.astype(
        {name: dtype for name, dtype in table.dtypes.items() if not isinstance(dtype, pd.CategoricalDtype)}
    )


def with_rows(table: pd.DataFrame, layouts: Sequence[Layout]) -> pd.DataFrame:
    """Return a table that holds these layouts, as if `with_row` had been called for one after the other."""
    index = RowIndex(table)
    for layout in dict.fromkeys(layout for layout in layouts if index.find(layout) is None):
        table = with_row(table, layout)
    return table


def with_derived(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> pd.DataFrame:
    """Return the table with the columns dp, edp and num_microbatches, which follow from the knobs of a row."""
    columns = Columns.of(table)
    dp = data_parallel_size(cluster.world_size, columns["tp"], columns["pp"], columns["cp"])
    edp = expert_data_parallel_size(cluster.world_size, columns["pp"], columns["ep"], columns["etp"])
    micro_batches = num_microbatches(workload.global_batch_size, columns["micro_batch_size"], dp)
    return table.assign(
        dp=dp.astype(np.int32), edp=edp.astype(np.int32), num_microbatches=micro_batches.astype(np.int32)
    )


class RowIndex:
    """Finds rows of a table of layouts again and again, in a time that does not depend on the number of rows."""

    def __init__(self, table: pd.DataFrame) -> None:
        rows = zip(*(table[knob].tolist() for knob in KNOBS), strict=True)
        self._rows: dict[tuple[Any, ...], int] = {}
        for number, values in enumerate(rows):
            self._rows.setdefault(values, number)

    def find(self, layout: Layout) -> int | None:
        """Return the position of a layout in the table; None if the table does not hold it."""
        return self._rows.get(_VALUES(layout))


_VALUES = attrgetter(*KNOBS)
"""Returns the values of all knobs of a layout, in the order of KNOBS."""
