"""Whether "within y% of the best with probability p" is true, and what stopping by it costs:
`python -m tests.bench.stopping`.

Recorded groups are searched to their ends. After each trial the claim is held against what was measured: of the
claims made with some probability, how many are true; and where a sweep would have stopped, after how many trials, and
how far from the best. Once with the predictor as it is, and once with one spoilt: its times times a power of every
knob and an error of each layout's own, drawn anew for each group and seed.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from optuna.trial import TrialState

from tests.bench.landscape import Landscape, landscapes
from tests.bench.recorded import LARGE_GROUP, STEP_TIMES, Group, groups
from tuner.predict.feasibility import MIN_FIT, Feasibility
from tuner.predict.implementation import implementation_of
from tuner.predict.time.step import step_time_ms
from tuner.search.observation import Observation
from tuner.search.predicted_rows import PredictedRows
from tuner.search.encoding import encode
from tuner.search.strategy import Mask

GAINS: Final = (0.005, 0.01, 0.02, 0.05)
CONFIDENCES: Final = (0.9, 0.95)
SPOILT_POWER: Final = 0.2
"""Deviation of the exponent of each knob."""
SPOILT_OWN: Final = 0.1
"""Deviation of each layout's own error, as a logarithm."""
SEEDS: Final = 5
"""Spoilt predictors a group."""
BINS: Final = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.001)


def spoilt(
    predicted_ms: NDArray[np.float64], features: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """The predictor with errors of its own making."""
    random = np.random.default_rng(seed)
    powers = random.normal(0, SPOILT_POWER, features.shape[1])
    own = random.normal(0, SPOILT_OWN, len(predicted_ms))
    found: NDArray[np.float64] = predicted_ms * np.exp(features @ powers * np.log(2) + own)
    return found


def search(
    name: str,
    rows: PredictedRows,
    available: Mask,
    measured_ms: NDArray[np.float64],
    truth_ms: NDArray[np.float64],
) -> Iterator[dict[str, float | str]]:
    """Search a space to its end; a line a trial once one is measured: the regret, and the probability of each gain.

    Args:
        name: Of the space, and of the run.
        rows: The strategy.
        available: Rows that may be launched.
        measured_ms: What a trial of each row measures; NaN where it runs out of memory.
        truth_ms: What each row's step takes, as far as is known.
    """
    count, best_ms, chosen = int(available.sum()), np.nanmin(truth_ms), -1
    for trial in range(1, count):
        row = rows.choose(available, trial)
        available[row] = False
        if np.isnan(measured_ms[row]):
            rows.tell(row, Observation(state=TrialState.PRUNED, out_of_memory=True))
        else:
            rows.tell(row, Observation(state=TrialState.COMPLETE, step_time_ms=float(measured_ms[row])))
            if chosen < 0 or measured_ms[row] < measured_ms[chosen]:
                chosen = row
        if (known := rows.certainty(available)) is not None:
            yield {
                "space": name,
                "trial": trial,
                "rows": count,
                "regret": truth_ms[chosen] / best_ms - 1,
                **{f"within {gain}": known.within(gain) for gain in GAINS},
                **{f"{gain} at {one}": known.suffices(gain, one) for gain in GAINS for one in CONFIDENCES},
            }


def calibration(claims: pd.DataFrame) -> pd.DataFrame:
    """Of the claims in each range of probability: how many, the mean of the probability, and the share that held."""
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
    """What stopping at a gain and a confidence would have cost, a line each; a space searched to its end counts so."""
    lines = []
    for gain in GAINS:
        for confidence in CONFIDENCES:
            stopped = claims[claims[f"{gain} at {confidence}"]].groupby("space").first()
            every = claims.groupby("space")["rows"].first()
            trials = stopped["trial"].reindex(every.index).fillna(every)
            regret = stopped["regret"].reindex(every.index).fillna(0.0)
            lines.append(
                {
                    "gain": gain,
                    "confidence": confidence,
                    "spaces": len(every),
                    "rows": every.mean(),
                    "trials": trials.mean(),
                    "held": (regret <= gain).mean(),
                    "mean regret": regret.mean(),
                    "worst regret": regret.max(),
                }
            )
    return pd.DataFrame(lines)


def claims_of(found: Iterable[Group], seeds: int) -> pd.DataFrame:
    """The lines of `search` over groups, with as many spoilt predictors each, or the predictor as it is."""
    lines: list[dict[str, float | str]] = []
    for group in found:
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


def claims_on(found: Iterable[Landscape], by_median: bool) -> pd.DataFrame:
    """The same over landscapes, each repeat once what the trials measure.

    The truth is the same repeat, of which a search may know all; or the repeats' median, from which a disturbed
    measurement differs, as only measuring again could tell.
    """
    lines: list[dict[str, float | str]] = []
    for landscape in found:
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
        names = ", ".join(one.sweep.name for one in measured)
        _print(f"landscapes: {names}", claims_on(measured, by_median=False))
        _print("landscapes, held against the repeats' median", claims_on(measured, by_median=True))


if __name__ == "__main__":
    main()
