"""How many trials each search policy needs to find the best layout: `python -m tests.bench.replay [FOLDER]`.

Every layout of a problem was measured, so that a trial is a look-up. For the recorded groups (A100s) and the landscapes
(CPU ranks), the command prints how well predicted step times agree with measured ones, and for each policy the number
of trials to the optimum and the regret. With a FOLDER, it also writes both there as CSV.
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
from tests.bench.problems import MeasuredProblem, measured, recorded, searched
from tests.bench.recorded import LARGE_GROUP
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.time.step import step_time_ms
from tuner.search.observation import Observation
from tuner.space.table import layout_at

SEEDS: Final = 20
"""Runs per problem of a policy that draws at random, or of any policy if layouts were measured more than once."""
WATCHED: Final = 10
"""Number of trials after which the last regret is read."""


def replay(problem: MeasuredProblem, policy: str, seed: int) -> dict[str, float]:
    """Search one problem until its optimum is found, for at least WATCHED trials unless no row is left.

    A trial measures one of the layout's repeats, drawn at random; the regret compares the medians. A trial that runs
    out of memory counts, and rules out the rows that provably need as much.

    Returns:
        The numbers of trials to the optimum and near it, and the regrets after some trials, by their names.
    """
    strategy, random = POLICIES[policy](problem, seed), np.random.default_rng(seed)
    median_ms, available = problem.step_time_ms, np.ones(len(problem.table), dtype=np.bool_)
    best_ms, best_found_ms = median_ms[problem.best], np.inf
    regrets: list[float] = []
    while available.any() and (len(regrets) < WATCHED or regrets[-1] > 0):
        row = strategy.choose(available, len(regrets))
        available[row] = False
        measured_ms = float(random.choice(problem.step_times_ms[row]))
        if np.isfinite(measured_ms):
            peak_gib = None if problem.peak_gib is None else float(problem.peak_gib[row])
            observation = Observation(state=TrialState.COMPLETE, step_time_ms=measured_ms, peak_gib=peak_gib)
            best_found_ms = min(best_found_ms, float(median_ms[row]))
        else:
            observation = Observation(state=TrialState.PRUNED, out_of_memory=True)
            layout = layout_at(problem.table, row)
            available &= ~needs_at_least_as_much_memory(
                problem.table, layout, problem.workload, problem.cluster
            )
        strategy.tell(row, observation)
        regrets.append(best_found_ms / best_ms - 1)
    curve = np.array(regrets)
    return {
        "to the optimum": 1 + int(np.argmax(curve <= 0)),
        "to within 2%": 1 + int(np.argmax(curve <= 0.02)),
        "to within 5%": 1 + int(np.argmax(curve <= 0.05)),
        "regret after 5": curve[min(4, len(curve) - 1)],
        "regret after 10": curve[min(WATCHED, len(curve)) - 1],
    }


def table(
    searched_problems: Sequence[MeasuredProblem], policies: Sequence[str], seeds: int = SEEDS
) -> pd.DataFrame:
    """Return one row per policy: the mean over problems and seeds of what `replay` returns."""
    return means(replays(searched_problems, policies, seeds))


def replays(
    searched_problems: Sequence[MeasuredProblem], policies: Sequence[str], seeds: int = SEEDS
) -> pd.DataFrame:
    """Return one row per problem, policy and seed: what `replay` returns."""
    return pd.DataFrame(
        {"problem": problem.name, "policy": policy} | replay(problem, policy, seed)
        for problem in searched_problems
        for policy in policies
        for seed in range(1 if policy in SEEDLESS and problem.step_times_ms.shape[1] == 1 else seeds)
    )


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per policy: the mean over the seeds of each problem, and then over the problems."""
    of_problem = runs.groupby(["policy", "problem"], sort=False).mean()
    return of_problem.groupby(level="policy", sort=False).mean()


def accuracy(problem: MeasuredProblem) -> dict[str, float]:
    """Return how well predictions hold: rank correlation, first choice, and errors after one calibrating trial."""
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
    """Print the results, and write them to a folder if one is given."""
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
    results = []
    for name, names in benchmarks.items():
        if not names:
            print(f"\n{name}: not at hand (the recorded step times lie in ../shared/data)")
            continue
        result = means(runs[runs["problem"].isin(names)])
        print(f"\n{name}: {len(names)}\n{held.loc[names].mean().round(3).to_string()}")
        print(result.round(3).to_string())
        results.append(result.assign(benchmark=name, problems=len(names)))
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        held.round(4).to_csv(folder / "predicted_times.csv")
        pd.concat(results).round(4).to_csv(folder / "policies.csv")


def _replays_of(problem: MeasuredProblem, policies: Sequence[str]) -> pd.DataFrame:
    return replays([problem], policies)


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    threadpool_limits(limits=1)
    # The threads of Optuna's Gaussian process wait for each other, which takes seven times as long (measured).
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
