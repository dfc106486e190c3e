"""The table of valid layouts: the row of a layout, the layout of a row, and the sizes that follow from a row."""

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
    """Return the position of a layout in the table, or None if the table lacks it."""
    mask = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        mask &= table[knob].to_numpy() == getattr(layout, knob)
    positions = np.flatnonzero(mask)
    return int(positions[0]) if len(positions) else None


def layout_at(table: pd.DataFrame, row: int) -> Layout:
    """Return the layout at a position of the table."""
    return layout_from({knob: table[knob].iloc[row] for knob in KNOBS})


def with_row(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return a table that holds a layout: `table` itself, or a copy with the layout appended as its last row."""
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
