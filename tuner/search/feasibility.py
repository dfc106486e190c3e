"""Whether a layout fits: the probability that its predicted peak does, and the rows that are not worth a launch."""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.cluster import Cluster
from tuner.predict import implementation_of
from tuner.predict.memory import fit_probability, peak_gib
from tuner.workload import Workload

RELATIVE_ERROR: Final = 0.05
"""Deviation of (measured - predicted) / predicted: on CPU trials the mean error is 1 to 2%, the worst found was 9%."""
MIN_FIT: Final = 0.01
"""A row that fits with a smaller probability is never launched. What the allocator and CUDA's context add to the
predicted peak is not counted, so that no row that fits is lost for them."""


def fit_probabilities(table: pd.DataFrame, workload: Workload, cluster: Cluster) -> NDArray[np.float64]:
    """P(peak <= the GPU's memory) of every row of a table of valid layouts."""
    peaks = peak_gib(table, workload, cluster, implementation_of(cluster))
    return fit_probability(peaks, cluster.gpu.memory_gib, RELATIVE_ERROR)
