"""Where the published layouts rank among the valid ones, and rows a second: `python -m tests.bench.published`.

A layout counts where it fits more likely than not, the published one as all others; one that does not is a miss,
and so are those whose training the workload cannot say (LoRA). What is not published is the best: recompute, and of
mixtures CUDA graphs and who dispatches.
Beside it: the ranks if the published layout counts whatever its memory, since it ran.
"""

import sys
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search_spaces.loader import load_cluster, load_model
from tests.bench.recorded import AXES, PUBLISHED, Published, published
from tests.bench.space import peak_rss_mib
from tuner.core.layout import layout_from
from tuner.core.workload import Workload
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.time.step import step_time_ms
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts

LIKELY: Final = 0.5
"""The probability from which a layout is said to fit."""
BEST: Final = 0.1
"""The share of the layouts that are called the best."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Where a published layout stands among those that vary the published axes and fit."""

    valid: bool
    """Whether it is in the space at all."""
    fits: float
    """The probability that it does."""
    rank: int
    """From 1; 0 where it is not likely to fit."""
    rank_as_run: int
    """The same if it fits for certain."""
    of: int
    predicted_ms: float
    best: str
    """The best predicted layout."""

    @property
    def in_best(self) -> bool:
        """Whether it is predicted to fit, and among the best tenth."""
        return 0 < self.rank <= BEST * self.of

    @property
    def in_best_as_run(self) -> bool:
        """Whether it is among the best tenth if it fits for certain."""
        return 0 < self.rank_as_run <= BEST * self.of


def rank(row: Published) -> Rank:
    """Rank one published layout by predicted step time."""
    own = row.is_published
    if not own.any():
        return Rank(False, 0.0, 0, 0, 1, np.nan, "")
    fits = fit_probabilities(row.table, row.workload, row.cluster)
    predicted = step_time_ms(row.table, row.workload, row.cluster)
    counted = np.flatnonzero(fits >= LIKELY)
    best = _best_of_each(row.table.iloc[counted], predicted[counted])
    likely = own & (fits >= LIKELY)

    def place(rows: NDArray[np.bool_]) -> int:
        return 1 + int((best < predicted[rows].min()).sum()) if rows.any() else 0

    top = int(counted[predicted[counted].argmin()]) if len(counted) else int(predicted.argmin())
    return Rank(
        valid=True,
        fits=float(fits[own].max()),
        rank=place(likely),
        rank_as_run=place(own),
        of=len(best) + (not likely.any()),
        predicted_ms=float(predicted[likely if likely.any() else own].min()),
        best=layout_from(dict(row.table.iloc[top])).label(),
    )


def _best_of_each(table: pd.DataFrame, predicted_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best time of every combination of the published axes."""
    best = table[AXES].assign(predicted_ms=predicted_ms).groupby(AXES, observed=True)["predicted_ms"].min()
    return best.to_numpy(dtype=np.float64)


def throughput() -> str:
    """Rows a second over 500,000 layouts of DeepSeek-V3 on 512 GPUs, and what they need of memory."""
    workload = Workload(model=load_model("deepseek-v3"), seq_length=4096, global_batch_size=15360)
    cluster = replace(load_cluster("dgx-h100"), nodes=64)
    table = enumerate_layouts(workload, cluster, default_domain(workload, cluster)).table.head(500_000)
    before, started = peak_rss_mib(), time.perf_counter()
    step_time_ms(table, workload, cluster)
    seconds = time.perf_counter() - started
    return f"{len(table) / seconds:,.0f} rows a second, peak memory +{peak_rss_mib() - before:.0f} MiB"


def main() -> None:
    """Print a line a published row, and how many are in the best tenth."""
    if not PUBLISHED.exists():
        sys.exit(f"{PUBLISHED}: not there; the ranks need the published layouts")
    lines = []
    for row in published():
        found = rank(row)
        lines.append(
            {
                "row": row.name,
                "comparable": row.comparable,
                "valid": found.valid,
                "fits": round(found.fits, 2),
                "rank": found.rank,
                "as run": found.rank_as_run,
                "of": found.of,
                "best tenth": row.comparable and found.in_best,
                "best tenth as run": found.in_best_as_run,
                "measured_ms": round(row.measured_ms),
                "predicted_ms": round(found.predicted_ms),
                "best": found.best,
            }
        )
    table = pd.DataFrame(lines)
    print(table.to_string())
    comparable = table[table["comparable"]]
    ratio = np.log((comparable["predicted_ms"] / comparable["measured_ms"]).to_numpy(dtype=np.float64))
    print(
        f"{table['valid'].sum()} of {len(table)} are in the space\n"
        f"in the best tenth, and predicted to fit: {table['best tenth'].sum()} of all {len(table)}, which is "
        f"{table['best tenth'].mean():.1%}; of the {len(comparable)} with all parameters trained "
        f"{table['best tenth'].sum() / len(comparable):.1%}\n"
        f"in the best tenth if what ran fits: {table['best tenth as run'].sum()} of all {len(table)}, "
        f"{comparable['best tenth as run'].sum()} of {len(comparable)}\n"
        f"predicted over measured, of these {len(comparable)}: median {np.exp(np.median(ratio)):.2f}, "
        f"mean factor off {np.exp(np.abs(ratio).mean()):.2f}"
    )
    print(throughput())


if __name__ == "__main__":
    main()
