"""How many trials each search policy needs where every layout was tried: `python -m tests.bench.replay [FOLDER]`.

A problem whose every layout ran is a cluster that answers at once. On the recorded groups (A100s) and on the
landscapes (CPU ranks), the command prints how well the predicted times hold against the measured ones, and for each
policy the trials to the optimum and the regret. With a FOLDER it also writes both there as CSV.
"""

import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.trial import TrialState
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tests.bench.policies import POLICIES, SEEDLESS, spearman
from tests.bench.problems import Problem, measured, recorded, searched
from tests.bench.recorded import LARGE_GROUP
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.time.step import step_time_ms
from tuner.search.observation import Observation
from tuner.space.table import layout_at

SEEDS: Final = 20
"""Runs of a policy that draws at random; and of any, where a layout was measured more than once."""
WATCHED: Final = 10
"""Trials after which the last regret is read."""


def replay(problem: Problem, policy: str, seed: int) -> dict[str, float]:
    """Search one problem until its optimum is found, and at least WATCHED trials long (or to its end).

    A trial answers with one of the layout's repeats, drawn at random; regret is of the medians. One that runs out of
    memory counts as a trial, and rules out what provably needs as much.
    """
    searcher, random = POLICIES[policy](problem, seed), np.random.default_rng(seed)
    middle_ms, available = problem.step_time_ms, np.ones(len(problem.table), dtype=np.bool_)
    best_ms, found_ms = middle_ms[problem.best], np.inf
    regrets: list[float] = []
    while available.any() and (len(regrets) < WATCHED or regrets[-1] > 0):
        row = searcher.choose(available, len(regrets))
        available[row] = False
        answer_ms = float(random.choice(problem.step_times_ms[row]))
        if np.isfinite(answer_ms):
            peak_gib = None if problem.peak_gib is None else float(problem.peak_gib[row])
            seen = Observation(state=TrialState.COMPLETE, step_time_ms=answer_ms, peak_gib=peak_gib)
            found_ms = min(found_ms, float(middle_ms[row]))
        else:
            seen = Observation(state=TrialState.PRUNED, out_of_memory=True)
            layout = layout_at(problem.table, row)
            available &= ~needs_at_least_as_much_memory(
                problem.table, layout, problem.workload, problem.cluster
            )
        searcher.tell(row, seen)
        regrets.append(found_ms / best_ms - 1)
    curve = np.array(regrets)
    return {
        "to the optimum": 1 + int(np.argmax(curve <= 0)),
        "to within 2%": 1 + int(np.argmax(curve <= 0.02)),
        "to within 5%": 1 + int(np.argmax(curve <= 0.05)),
        "regret after 5": curve[min(4, len(curve) - 1)],
        "regret after 10": curve[min(WATCHED, len(curve)) - 1],
    }


def table(found: Sequence[Problem], policies: Sequence[str], seeds: int = SEEDS) -> pd.DataFrame:
    """One row a policy: the mean over problems and seeds of what `replay` gives."""
    return means(replays(found, policies, seeds))


def replays(found: Sequence[Problem], policies: Sequence[str], seeds: int = SEEDS) -> pd.DataFrame:
    """One row for every problem, policy and seed: what `replay` gives."""
    return pd.DataFrame(
        {"problem": problem.name, "policy": policy} | replay(problem, policy, seed)
        for problem in found
        for policy in policies
        for seed in range(1 if policy in SEEDLESS and problem.step_times_ms.shape[1] == 1 else seeds)
    )


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a policy: the mean over the seeds of a problem, then over the problems."""
    of_problem = runs.groupby(["policy", "problem"], sort=False).mean()
    return of_problem.groupby(level="policy", sort=False).mean()


def accuracy(problem: Problem) -> dict[str, float]:
    """How the predicted times hold: rank correlation, the first pick, and errors after one calibrating trial."""
    ran, measured_ms = problem.ran, problem.step_time_ms[problem.ran]
    predicted = step_time_ms(problem.table, problem.workload, problem.cluster, "torch")[ran]
    ratio = predicted / measured_ms
    first = int(predicted.argmin())
    return {
        "rows": len(ratio),
        "spearman": spearman(predicted, measured_ms),
        "regret of the first": float(measured_ms[first] / measured_ms.min() - 1),
        "error, calibrated on the first": float(np.abs(ratio / ratio[first] - 1).mean()),
        "error, on any row": float(np.abs(ratio[:, None] / ratio - 1).mean()),
        "predicted over measured": float(np.median(ratio)),
    }


def main() -> None:
    """Print, and publish in a folder if one is given."""
    landscapes = [searched(problem) for problem in measured()]
    everything = [*recorded(), *landscapes]
    with ProcessPoolExecutor(initializer=_quiet) as pool:
        runs = pd.concat(pool.map(_replays_of, everything, [list(POLICIES)] * len(everything)))
    held = pd.DataFrame({problem.name: accuracy(problem) for problem in everything}).T
    held.index.name = "problem"
    large = [problem.name for problem in recorded(LARGE_GROUP)]
    benchmarks = {
        "recorded groups of 20 rows or more": large,
        "all recorded groups": [problem.name for problem in recorded()],
        **{problem.name: [problem.name] for problem in landscapes},
    }
    found = []
    for name, names in benchmarks.items():
        if not names:
            print(f"\n{name}: not at hand (the recorded step times lie in ../shared/data)")
            continue
        result = means(runs[runs["problem"].isin(names)])
        print(f"\n{name}: {len(names)}\n{held.loc[names].mean().round(3).to_string()}")
        print(result.round(3).to_string())
        found.append(result.assign(benchmark=name, problems=len(names)))
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        held.round(4).to_csv(folder / "predicted_times.csv")
        pd.concat(found).round(4).to_csv(folder / "policies.csv")


def _replays_of(problem: Problem, policies: Sequence[str]) -> pd.DataFrame:
    return replays([problem], policies)


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    threadpool_limits(limits=1)
    # Optuna's Gaussian process: threads that wait for each other cost seven times as much.
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
