"""Where the published layouts rank among the valid ones, and rows a second: `python -m tests.bench.published`."""

import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search_spaces.loader import load_cluster, load_model
from tests.bench.recorded import AXES, PUBLISHED, Published, published
from tests.bench.space import peak_rss_mib
from tuner.layout import layout_from
from tuner.predict.memory import peak_gib
from tuner.predict.time import step_time_ms
from tuner.space import default_domain, enumerate_layouts
from tuner.workload import Workload


@dataclass(frozen=True, slots=True)
class Rank:
    """Where a published layout stands; recompute, which is not published, is each layout's best."""

    valid: bool
    """Whether it is in the space at all."""
    predicted_to_fit: bool
    rank: int
    """From 1, among the layouts that are predicted to fit, and itself, which ran."""
    of: int
    predicted_ms: float
    best: str
    """The best predicted layout."""

    @property
    def share(self) -> float:
        """The rank as a share of the layouts."""
        return self.rank / self.of


def rank(row: Published) -> Rank:
    """Rank one published layout by predicted step time."""
    fits = peak_gib(row.table, row.workload, row.cluster) <= row.cluster.gpu.memory_gib
    predicted = step_time_ms(row.table, row.workload, row.cluster)
    own = row.is_published
    if not own.any():
        return Rank(False, False, 0, 1, np.nan, "")
    counted = np.flatnonzero(fits | own)
    best = _best_of_each(row.table.iloc[counted], predicted[counted])
    own_ms = predicted[own].min()
    top = counted[predicted[counted].argmin()]
    return Rank(
        valid=True,
        predicted_to_fit=bool((fits & own).any()),
        rank=1 + int((best < own_ms).sum()),
        of=len(best),
        predicted_ms=float(own_ms),
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
                "fits": found.predicted_to_fit,
                "rank": found.rank,
                "of": found.of,
                "share": round(found.share, 3),
                "measured_ms": round(row.measured_ms),
                "predicted_ms": round(found.predicted_ms),
                "best": found.best,
            }
        )
    table = pd.DataFrame(lines)
    print(table.to_string())
    for name, part in (("all rows", table), ("all parameters, no FSDP", table[table["comparable"]])):
        print(f"{name}: {(part['share'] <= 0.1).sum()} of {len(part)} in the best tenth")
    print(throughput())


if __name__ == "__main__":
    main()
