"""How many trials each search policy needs on recorded groups: `python -m tests.bench.replay [seeds] [policy...]`.

Every recorded layout ran, so that a group is a cluster that answers at once. Also prints how well the predicted
times hold against the measured ones.
"""

import sys
import time
from collections.abc import Iterable
from typing import Final

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray

from tests.bench.policies import POLICIES, SEEDLESS
from tests.bench.recorded import LARGE_GROUP, STEP_TIMES, Group, groups
from tuner.predict.time import step_time_ms

SEEDS: Final = 20
WATCHED: Final = 10
"""Trials after which the last regret is read."""


def replay(group: Group, policy: str, seed: int) -> dict[str, float]:
    """Search one group until its optimum is found, and at least WATCHED trials long (or to its end)."""
    searcher = POLICIES[policy](group, seed)
    available = np.ones(len(group.table), dtype=np.bool_)
    regrets: list[float] = []
    best = group.measured_ms.min()
    while available.any() and (len(regrets) < WATCHED or regrets[-1] > 0):
        row = searcher.choose(available)
        available[row] = False
        searcher.tell(row, float(group.measured_ms[row]))
        regret = float(group.measured_ms[row] / best - 1)
        regrets.append(min(regret, *regrets[-1:], regret))
    curve = np.array(regrets)
    return {
        "to the optimum": 1 + int(np.argmax(curve <= 0)),
        "to within 2%": 1 + int(np.argmax(curve <= 0.02)),
        "to within 5%": 1 + int(np.argmax(curve <= 0.05)),
        "regret at 1": curve[0],
        "regret at 5": curve[min(4, len(curve) - 1)],
        "regret at 10": curve[min(WATCHED, len(curve)) - 1],
    }


def table(found: Iterable[Group], policies: Iterable[str], seeds: int) -> pd.DataFrame:
    """One row a policy: the mean over groups and seeds of what `replay` gives."""
    found = list(found)
    rows = {}
    for policy in policies:
        started = time.perf_counter()
        runs = [
            replay(group, policy, seed)
            for group in found
            for seed in range(1 if policy in SEEDLESS else seeds)
        ]
        rows[policy] = dict(pd.DataFrame(runs).mean()) | {"seconds": time.perf_counter() - started}
    return pd.DataFrame(rows).T


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The correlation of ranks."""
    return float(pd.Series(one).rank().corr(pd.Series(other).rank()))


def accuracy(group: Group) -> dict[str, float]:
    """How the predicted times hold: rank correlation, the first pick, and errors after one calibrating trial."""
    predicted = step_time_ms(group.table, group.workload, group.cluster, "torch")
    ratio = predicted / group.measured_ms
    first = int(predicted.argmin())
    return {
        "rows": len(ratio),
        "spearman": spearman(predicted, group.measured_ms),
        "regret of the first": float(group.measured_ms[first] / group.measured_ms.min() - 1),
        "error, calibrated on the first": float(np.abs(ratio / ratio[first] - 1).mean()),
        "error, on any row": float(np.abs(ratio[:, None] / ratio - 1).mean()),
        "predicted over measured": float(np.median(ratio)),
    }


def main() -> None:
    """Print the accuracy of the predicted times and the table of the policies, for large groups and for all."""
    if not STEP_TIMES.exists():
        sys.exit(f"{STEP_TIMES}: not there; the replay needs the recorded step times")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS
    policies = sys.argv[2:] or list(POLICIES)
    for name, rows in (("groups of 20 rows or more", LARGE_GROUP), ("all groups", 1)):
        found = list(groups(rows=rows))
        held = pd.DataFrame({group.name: accuracy(group) for group in found}).T
        print(f"\n{name}: {len(found)}\n{held.mean().round(3).to_string()}")
        if rows == LARGE_GROUP:
            print(held.round(3).to_string())
        print(table(found, policies, seeds).round(3).to_string())


if __name__ == "__main__":
    main()
