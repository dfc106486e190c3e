"""How long the ranking needs after 500 trials to choose the next row, and to say how near the best row is.

Run `python -m tests.bench.ask`.
"""

import time
from typing import Final

import numpy as np

from tuner.search.ranking import Ranking

ROWS: Final = 100_000
"""Rows of the table."""
KNOBS: Final = 12
"""Features of a row."""
TRIALS: Final = 500
"""Trials that the ranking has learnt from."""


def main() -> None:
    """Print the wall and CPU time of five choices."""
    random = np.random.default_rng(0)
    predicted_ms = random.uniform(100, 1000, ROWS)
    ranking = Ranking(random.integers(0, 6, (ROWS, KNOBS)).astype(np.float64), predicted_ms)
    available = np.ones(ROWS, dtype=np.bool_)
    for row in range(TRIALS):
        available[row] = False
        ranking.tell(row, float(predicted_ms[row] * random.uniform(0.9, 1.1)))
    for row in range(TRIALS, TRIALS + 5):
        ranking.tell(row, float(predicted_ms[row]))
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        ranking.choose(available)
        wall_ms, cpu_ms = (time.perf_counter() - wall_s) * 1e3, (time.process_time() - cpu_s) * 1e3
        started_s = time.perf_counter()
        ranking.certainty(available)
        certainty_ms = (time.perf_counter() - started_s) * 1e3
        print(
            f"{row + 1} trials, {ROWS:,} rows: {wall_ms:.0f} ms wall, {cpu_ms:.0f} ms CPU; "
            f"how near the best is: {certainty_ms:.0f} ms"
        )


if __name__ == "__main__":
    main()
