"""Turns the rows of a table into points, between which the surrogate measures distances."""

import numpy as np
import pandas as pd

from tuner.core.columns import Floats
from tuner.core.layout import KNOBS


def encode(table: pd.DataFrame) -> Floats:
    """Return the knobs that vary as columns of numbers, of shape [rows, columns].

    Sizes become doublings, switches 0 or 1, and each text of a knob becomes a column of its own. If no knob varies,
    the result is one column of zeros.
    """
    columns = []
    for knob in KNOBS:
        column = table[knob]
        if column.nunique() < 2:
            continue
        if pd.api.types.is_bool_dtype(column):
            columns.append(column.to_numpy(dtype=np.float64))
        elif pd.api.types.is_numeric_dtype(column):
            columns.append(doublings(column))
        else:
            columns += [(column == value).to_numpy(dtype=np.float64) for value in column.unique()]
    return np.column_stack(columns) if columns else np.zeros((len(table), 1))


def doublings(sizes: pd.Series) -> Floats:
    """Return sizes as logarithms to base 2; a size of 0, which leaves the size to Megatron, counts as 1/2."""
    logarithms: Floats = np.log2(np.maximum(sizes.to_numpy(dtype=np.float64), 0.5))
    return logarithms
