"""Where published layouts rank among the valid ones, and how fast step times are predicted.

Run `python -m tests.bench.published`. Layouts count, the published one and all others, if they are more likely than not
to fit. A published layout that is predicted not to fit is a miss, and so is one whose training a workload cannot
describe (LoRA). The sources leave some choices open: recompute, and for mixtures of experts CUDA graphs and the
dispatcher. A published layout takes its best time over the open choices, and so do the others. The output also has the
rank that the published layout takes if it fits for certain, since it ran.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from search_spaces.loader import load_cluster, load_model
from tests.bench.recorded import AXES, PUBLISHED, Published, published
from tests.bench.space import peak_rss_mib
from tuner.core.columns import Bools, Floats, Ints
from tuner.core.workload import Workload
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.time.step import step_time_ms
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import layout_at

LIKELY: Final = 0.5
"""Smallest probability of fitting with which a layout counts."""
BEST: Final = 0.1
"""Share of the layouts that are called the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """Where a published layout stands among the layouts that are likely to fit."""

    valid: bool
    """Whether the layout is in the space at all."""
    fits: float
    """Predicted probability that the layout fits."""
    rank: int
    """Rank by predicted step time, from 1; 0 if the layout is not likely to fit."""
    rank_as_run: int
    """Rank by predicted step time if the layout fits for certain, from 1."""
    layouts: int
    """Number of ranked layouts: combinations of the published axes."""
    predicted_ms: float
    """Predicted step time of the layout."""
    best: str
    """The layout with the smallest predicted step time."""

    @property
    def in_best(self) -> bool:
        """Whether the layout is likely to fit and among the best tenth."""
        return 0 < self.rank <= BEST * self.layouts

    @property
    def in_best_as_run(self) -> bool:
        """Whether the layout is among the best tenth if it fits for certain."""
        return 0 < self.rank_as_run <= BEST * self.layouts


NOT_IN_THE_SPACE: Final = Rank(
    valid=False, fits=0.0, rank=0, rank_as_run=0, layouts=1, predicted_ms=np.nan, best=""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Predictions:
    """What is predicted of the table that several published layouts share."""

    table: pd.DataFrame
    fits: Floats
    """Probability that each row fits."""
    step_time_ms: Floats
    counted: Ints
    """Rows that are likely to fit."""
    best_ms: Floats
    """Best time of each combination of the published axes among the counted rows."""


def ranks(layouts: Iterable[Published]) -> Iterator[tuple[Published, Rank]]:
    """Yield each published layout with its rank by predicted step time."""
    predictions: dict[int, _Predictions] = {}
    for layout in layouts:
        # Layouts of the same problem share one table.
        key = id(layout.table)
        if key not in predictions:
            predictions[key] = _predict(layout)
        yield layout, _rank(layout.is_published, predictions[key])


def _predict(layout: Published) -> _Predictions:
    fits = fit_probabilities(layout.table, layout.workload, layout.cluster)
    predicted_ms = step_time_ms(layout.table, layout.workload, layout.cluster)
    counted = np.flatnonzero(fits >= LIKELY)
    best = layout.table[AXES].iloc[counted].assign(predicted_ms=predicted_ms[counted])
    best_ms = best.groupby(AXES, observed=True)["predicted_ms"].min().to_numpy(dtype=np.float64)
    return _Predictions(
        table=layout.table, fits=fits, step_time_ms=predicted_ms, counted=counted, best_ms=best_ms
    )


def _rank(is_published: Bools, predictions: _Predictions) -> Rank:
    if not is_published.any():
        return NOT_IN_THE_SPACE
    fits, predicted_ms, counted = predictions.fits, predictions.step_time_ms, predictions.counted
    likely = is_published & (fits >= LIKELY)

    def place(rows: Bools) -> int:
        return 1 + int((predictions.best_ms < predicted_ms[rows].min()).sum()) if rows.any() else 0

    fastest = counted[predicted_ms[counted].argmin()] if len(counted) else predicted_ms.argmin()
    return Rank(
        valid=True,
        fits=float(fits[is_published].max()),
        rank=place(likely),
        rank_as_run=place(is_published),
        layouts=len(predictions.best_ms) + (not likely.any()),
        predicted_ms=float(predicted_ms[likely if likely.any() else is_published].min()),
        best=layout_at(predictions.table, int(fastest)).label(),
    )


def throughput() -> str:
    """Return how many rows per second are predicted over 500,000 layouts of DeepSeek-V3 on 512 GPUs, and the memory."""
    workload = Workload(model=load_model("deepseek-v3"), seq_length=4096, global_batch_size=15360)
    cluster = replace(load_cluster("dgx-h100"), nodes=64)
    table = enumerate_layouts(workload, cluster, default_domain(workload, cluster)).table.head(500_000)
    before_mib, started = peak_rss_mib(), time.perf_counter()
    step_time_ms(table, workload, cluster)
    seconds = time.perf_counter() - started
    return f"{len(table) / seconds:,.0f} rows per second, peak memory +{peak_rss_mib() - before_mib:.0f} MiB"


def main() -> None:
    """Print one line per published layout, and how many are in the best tenth."""
    if not PUBLISHED.exists():
        sys.exit(f"{PUBLISHED} does not exist; the ranks need the published layouts")
    table = pd.DataFrame([_line(layout, rank) for layout, rank in ranks(published())])
    print(table.to_string())
    comparable = table[table["comparable"]]
    ratio = np.log((comparable["predicted_ms"] / comparable["measured_ms"]).to_numpy(dtype=np.float64))
    print(
        f"{table['valid'].sum()} of {len(table)} are in the space\n"
        f"in the best tenth and predicted to fit: {table['best tenth'].sum()} of all {len(table)}, which is "
        f"{table['best tenth'].mean():.1%}; of the {len(comparable)} with all parameters trained "
        f"{table['best tenth'].sum() / len(comparable):.1%}\n"
        f"in the best tenth if what ran fits: {table['best tenth as run'].sum()} of all {len(table)}, "
        f"{comparable['best tenth as run'].sum()} of {len(comparable)}\n"
        f"predicted over measured, of these {len(comparable)}: median {np.exp(np.median(ratio)):.2f}, "
        f"mean factor off {np.exp(np.abs(ratio).mean()):.2f}"
    )
    print(throughput())


def _line(layout: Published, rank: Rank) -> dict[str, Any]:
    return {
        "row": layout.name,
        "comparable": layout.comparable,
        "valid": rank.valid,
        "fits": round(rank.fits, 2),
        "rank": rank.rank,
        "as run": rank.rank_as_run,
        "of": rank.layouts,
        "best tenth": layout.comparable and rank.in_best,
        "best tenth as run": rank.in_best_as_run,
        "measured_ms": round(layout.measured_ms),
        "predicted_ms": round(rank.predicted_ms),
        "best": rank.best,
    }


if __name__ == "__main__":
    main()
