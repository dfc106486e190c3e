"""Whether the claim "within y% of the best with probability p" is true, and what it costs to stop when it is made:
`python -m tests.bench.stopping`.

Recorded groups are searched to their ends. After each trial, the claim is compared with what was measured. The command
prints how many of the claims made with some probability are true, and after how many trials, and how far from the best,
a sweep would have stopped. It does so with the predictor as it is, and with a spoilt one: its step times are multiplied
by a power of every knob and by an error of each layout, drawn anew for each group and seed.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from tests.bench.landscape import Landscape, landscapes
from tests.bench.recorded import LARGE_GROUP, STEP_TIMES, Group, groups
from tuner.core.columns import Floats
from tuner.predict.feasibility import MIN_FIT, Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.time.step import step_time_ms
from tuner.search.encoding import encode
from tuner.search.observation import Observation
from tuner.search.predicted_rows import PredictedRows
from tuner.search.strategy import Mask

GAINS: Final = (0.005, 0.01, 0.02, 0.05)
CONFIDENCES: Final = (0.9, 0.95)
SPOILT_POWER: Final = 0.2
"""Standard deviation of the exponent of each knob. Assumed."""
SPOILT_OWN: Final = 0.1
"""Standard deviation of each layout's error, as a logarithm. Assumed."""
SEEDS: Final = 5
"""Number of spoilt predictors per group."""
BINS: Final = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.001)
"""The edges of the ranges of probability that claims are counted in."""


def spoilt(predicted_ms: Floats, features: Floats, seed: int) -> Floats:
    """Return predicted step times with errors added; `features` are the rows as points, of shape [rows, columns]."""
    random = np.random.default_rng(seed)
    powers = random.normal(0, SPOILT_POWER, features.shape[1])
    errors = random.normal(0, SPOILT_OWN, len(predicted_ms))
    spoilt_ms: Floats = predicted_ms * np.exp(features @ powers * np.log(2) + errors)
    return spoilt_ms


def search(
    name: str,
    strategy: PredictedRows,
    available: Mask,
    measured_ms: Floats,
    truth_ms: Floats,
) -> Iterator[dict[str, float | str]]:
    """Search a space to its end, and yield one line per trial once one is measured.

    A line holds the regret, the probability of each gain, and whether a sweep would stop.

    Args:
        name: the name of the space and of the run.
        strategy: chooses the rows.
        available: which rows may be launched; all of them are tried.
        measured_ms: what a trial of each row measures, NaN if it runs out of memory, of shape [rows].
        truth_ms: the true step time of each row, as far as it is known, of shape [rows].
    """
    count, best_ms, chosen = int(available.sum()), np.nanmin(truth_ms), -1
    for trial in range(1, count):
        row = strategy.choose(available, trial)
        available[row] = False
        if np.isnan(measured_ms[row]):
            strategy.tell(row, Observation(state=TrialState.PRUNED, out_of_memory=True))
        else:
            strategy.tell(row, Observation(state=TrialState.COMPLETE, step_time_ms=float(measured_ms[row])))
            if chosen < 0 or measured_ms[row] < measured_ms[chosen]:
                chosen = row
        if (claim := strategy.certainty(available)) is not None:
            yield {
                "space": name,
                "trial": trial,
                "rows": count,
                "regret": truth_ms[chosen] / best_ms - 1,
                **{f"within {gain}": claim.within(gain) for gain in GAINS},
                **{
                    f"{gain} at {confidence}": claim.suffices(gain, confidence)
                    for gain in GAINS
                    for confidence in CONFIDENCES
                },
            }


def calibration(claims: pd.DataFrame) -> pd.DataFrame:
    """Return for each gain and range of probability how many claims were made, their mean probability, and the share
    that held.
    """
    lines = []
    for gain in GAINS:
        claimed, held = claims[f"within {gain}"], claims["regret"] <= gain
        for low, high in pairwise(BINS):
            chosen = (claimed >= low) & (claimed < high)
            if chosen.any():
                lines.append(
                    {
                        "gain": gain,
                        "probability": f"{low:.2f} to {min(high, 1):.2f}",
                        "claims": int(chosen.sum()),
                        "claimed": claimed[chosen].mean(),
                        "held": held[chosen].mean(),
                    }
                )
    return pd.DataFrame(lines)


def stops(claims: pd.DataFrame) -> pd.DataFrame:
    """Return one line per gain and confidence: what it would have cost to stop there.

    A space in which the search would not have stopped counts as searched to its end.
    """
    lines = []
    for gain in GAINS:
        for confidence in CONFIDENCES:
            stopped = claims[claims[f"{gain} at {confidence}"]].groupby("space").first()
            rows = claims.groupby("space")["rows"].first()
            trials = stopped["trial"].reindex(rows.index).fillna(rows)
            regret = stopped["regret"].reindex(rows.index).fillna(0.0)
            lines.append(
                {
                    "gain": gain,
                    "confidence": confidence,
                    "spaces": len(rows),
                    "rows": rows.mean(),
                    "trials": trials.mean(),
                    "held": (regret <= gain).mean(),
                    "mean regret": regret.mean(),
                    "worst regret": regret.max(),
                }
            )
    return pd.DataFrame(lines)


def claims_of(searched: Iterable[Group], seeds: int) -> pd.DataFrame:
    """Return the lines of `search` over groups.

    Each group is searched with `seeds` spoilt predictors, or with the predictor as it is if `seeds` is 0.
    """
    lines: list[dict[str, float | str]] = []
    for group in searched:
        predicted_ms = step_time_ms(group.table, group.workload, group.cluster, "torch")
        features = encode(group.table)
        for seed in range(max(1, seeds)):
            used = spoilt(predicted_ms, features, seed) if seeds else predicted_ms
            everything = np.ones(len(used), dtype=np.bool_)
            strategy = PredictedRows(group.table, used)
            lines += search(
                f"{group.name} {seed}", strategy, everything, group.measured_ms, group.measured_ms
            )
    return pd.DataFrame(lines)


def claims_on(searched: Iterable[Landscape], by_median: bool) -> pd.DataFrame:
    """Return the lines of `search` over landscapes; each repeat is once what the trials measure.

    Args:
        searched: the landscapes.
        by_median: whether the truth is the median of the repeats, from which a disturbed measurement differs; otherwise
            it is the repeat that the trials measure, which a search can learn completely.
    """
    lines: list[dict[str, float | str]] = []
    for landscape in searched:
        sweep, table = landscape.sweep, landscape.table
        predicted_ms = step_time_ms(table, sweep.workload, sweep.cluster, implementation_of(sweep.cluster))
        for repeat, measured_ms in enumerate(landscape.step_time_ms.T):
            truth_ms = landscape.median_ms if by_median else measured_ms
            feasibility = Feasibility(table, sweep.workload, sweep.cluster)
            strategy = PredictedRows(table, predicted_ms, feasibility, sweep.measurement)
            may_fit = feasibility.probabilities() >= MIN_FIT
            lines += search(f"{sweep.name} {repeat}", strategy, may_fit, measured_ms, truth_ms)
    return pd.DataFrame(lines)


def _print(title: str, claims: pd.DataFrame) -> None:
    print(f"\n{title}\n{calibration(claims).round(3).to_string(index=False)}")
    print(stops(claims).round(4).to_string(index=False))


def main() -> None:
    """Print the calibration and the stops for large groups, all groups, spoilt predictors, and landscapes."""
    if not STEP_TIMES.exists():
        sys.exit(f"{STEP_TIMES}: not there; the replay needs the recorded step times")
    _print("groups of 20 rows or more", claims_of(groups(rows=LARGE_GROUP), 0))
    _print("all groups of 5 rows or more", claims_of(groups(rows=5), 0))
    _print("groups of 20 rows or more, spoilt predictor", claims_of(groups(rows=LARGE_GROUP), SEEDS))
    if measured := list(landscapes()):
        names = ", ".join(landscape.sweep.name for landscape in measured)
        _print(f"landscapes: {names}", claims_on(measured, by_median=False))
        _print("landscapes, held against the repeats' median", claims_on(measured, by_median=True))


if __name__ == "__main__":
    main()
