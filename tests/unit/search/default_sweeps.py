"""Default sweeps of built-in models, which have a grid and a refinement, and keys to compare their layouts by."""

from functools import cache
from typing import Any

import pandas as pd

from search_spaces.loader import load_cluster
from tests.replay import sweep_of, table_of
from tests.trials import CLUSTER
from tuner.core.cluster import Cluster
from tuner.core.layout import KNOBS, Layout
from tuner.sweep.configuration import Sweep


def default_sweep(cluster: Cluster = CLUSTER, **keys: Any) -> Sweep:
    """A sweep that names no knobs; `keys` as in a sweep file."""
    return sweep_of(cluster, knobs=None, **keys)


@cache
def built_in_sweep(name: str) -> Sweep:
    """A default sweep of a built-in model, for the test module's lifetime."""
    model, cluster, seq_length, batch, precision = {
        "tiny-gpt": ("tiny-gpt", "cpu-4", 128, 8, "fp32"),
        "tiny-moe": ("tiny-moe", "cpu-4", 128, 8, "fp32"),
        "qwen3-30b-a3b": ("qwen3-30b-a3b", "dgx-h100", 4096, 512, "bf16"),
    }[name]
    choice = {"model": model, "seq_length": seq_length, "global_batch_size": batch, "precision": precision}
    return default_sweep(load_cluster(cluster), workload=choice)


@cache
def built_in_grid(name: str) -> pd.DataFrame:
    """The grid of that sweep."""
    return table_of(built_in_sweep(name))


def layout_keys(table: pd.DataFrame) -> set[tuple[Any, ...]]:
    """The layouts of a table as comparable keys."""
    return set(table[list(KNOBS)].itertuples(index=False, name=None))


def layout_key(layout: Layout) -> tuple[Any, ...]:
    """One layout as such a key."""
    return tuple(getattr(layout, knob) for knob in KNOBS)
