"""Rows that need at least as much memory as a layout that ran out of it: pruned without a run, by memory alone."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.layout import KNOBS, Layout

_RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")


def needs_at_least_as_much_memory(table: pd.DataFrame, layout: Layout) -> NDArray[np.bool_]:
    """Which rows provably need no less memory than `layout`, itself included.

    All other knobs are equal, and each of these moves only upwards, so that every tensor of the layout's peak has a
    counterpart at least as large in the row's:

    - micro_batch_size: activations in flight are min(pp, M) micro-batches of gbs/(dp*M) samples, which never shrink;
    - recompute: dropping it keeps a superset of the tensors (two kinds of recompute are not compared);
    - use_distributed_optimizer: without it the state is held whole instead of in shards.
    """
    mask: NDArray[np.bool_] = np.ones(len(table), dtype=bool)
    same_recompute = np.ones(len(table), dtype=bool)
    for knob in KNOBS:
        column, value = table[knob].to_numpy(), getattr(layout, knob)
        if knob == "micro_batch_size":
            mask &= column >= value
        elif knob == "use_distributed_optimizer":
            mask &= (column == value) | ~column.astype(bool)
        elif knob in _RECOMPUTE:
            same_recompute &= column == value
        else:
            mask &= column == value
    mask &= same_recompute | (table["recompute_granularity"].to_numpy() == "none")
    return mask
