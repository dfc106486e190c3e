"""The table of valid layouts: finding a layout's row, and the layout of a row."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tuner.core.layout import KNOBS, Layout, layout_from

if TYPE_CHECKING:
    pass


def find_row(table: pd.DataFrame, layout: Layout) -> int | None:
    """The position of a layout in the table, or None."""
    mask = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        mask &= table[knob].to_numpy() == getattr(layout, knob)
    rows = np.flatnonzero(mask)
    return int(rows[0]) if len(rows) else None


def layout_at(table: pd.DataFrame, row: int) -> Layout:
    """The layout at a position of the table."""
    return layout_from({knob: table[knob].iloc[row] for knob in KNOBS})


def with_row(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """The table with a layout's row, appended where the layout lies outside the searched values."""
    if find_row(table, layout) is not None:
        return table
    row = pd.DataFrame([{knob: getattr(layout, knob) for knob in table.columns}])
    joined = pd.concat([table, row], ignore_index=True)
    return joined.astype(
        {name: kind for name, kind in table.dtypes.items() if not isinstance(kind, pd.CategoricalDtype)}
    )
