"""What the trials of a sweep answer: which layout is fastest, by how much, how sure that is, and who is out. Pure.

While the search runs, a layout stands by one measurement. Once the finals ran, they alone count: each finalist by
all of its runs. The interval is a bootstrap of runs and of steps: three runs say little about how much runs differ, so
the deviations of all finalists' runs from their own layout's mean are drawn from together (residual bootstrap: Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 9), and the steps within a run are drawn anew on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit  # type: ignore[import-untyped]

from tuner.analysis.drift import Drift, drift
from tuner.core.layout import Layout
from tuner.core.workload import Precision
from tuner.trial.contract import Metrics, Outcome
from tuner.trial.finished import SEARCHED, UNFINISHED, FinishedTrial

Floats = NDArray[np.float64]

DRAWS: Final = 2000

LOSS_TOLERANCE: Final[Mapping[Precision, float]] = {
    "fp32": 1e-4,
    "bf16": 5e-3,
    "fp16": 5e-3,
    "fp8": 1e-2,
    "mxfp8": 1e-2,
    "nvfp4": 3e-2,
}
"""How far the losses of two layouts may lie apart in one step, as a share: layouts add up in other orders.

fp32 and bf16: tests/integration/test_parity.py holds 60 layouts to 1e-4 and 2e-3 over 3 steps, and sweeps of tiny
models in fp32 stayed below 1e-7 over 13. The others are chosen, wider where rounding is coarser. The baseline's
own runs widen it where they differ by more.
"""

DRAWN_TOLERANCE: Final = 0.05
"""The same where a program draws the first weights itself. Megatron seeds them by tensor and pipeline rank, so that
every layout trains another draw: in ten steps of a tiny recipe of Megatron Bridge tp 1 and tp 2 came 0.55% apart so.
Chosen: what trains at all stays within it, what loses gradients or tokens soon does not.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A step time over another one, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether noise cannot tell the two apart."""
        return self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One layout in the ranking."""

    layout: Layout
    runs: tuple[FinishedTrial, ...]
    """What it stands by: its finals, or its one measurement in the search."""
    metrics: Metrics
    """Of these runs together."""
    over_best: Ratio
    """Its step time over the best layout's. In the search from the near ends of both 95% intervals, so wider than
    its own, and with the machine's drift taken out."""

    @property
    def row(self) -> FinishedTrial:
        """The run that stands for all: the one in the middle."""
        return _middle(self.runs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The ranking of a sweep's layouts."""

    ranking: tuple[Standing, ...]
    """Fastest first: the finalists, or before the finals every measured layout. Never empty."""
    is_final: bool
    """Whether it rests on finals."""
    baseline: Standing | None
    """The baseline's place in it; None where it did not complete."""
    out: Mapping[Layout, str]
    """The layouts that measured and yet are out: why."""
    drift: Drift | None

    @property
    def best(self) -> Standing:
        """The fastest."""
        return self.ranking[0]

    @property
    def tied(self) -> tuple[Standing, ...]:
        """What noise cannot tell from the best, the best included."""
        return tuple(standing for standing in self.ranking if standing.over_best.is_tie)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the measurements that the answer rests on are not to be trusted: those of the best and the baseline."""
        standings = [self.best, self.baseline] if self.baseline is not self.best else [self.best]
        return tuple(
            f"t{row.number:04d} {row.layout.label()}: {suspicion}"
            for standing in standings
            if standing is not None
            for row in standing.runs
            for suspicion in row.result.suspicions
        )


def answer(rows: Sequence[FinishedTrial]) -> Answer | None:
    """What the finished trials answer; None where no layout is measured, or all of them are out."""
    rows = sorted(rows, key=lambda row: row.number)
    known, out = drift(rows), ruled_out(rows)
    finals = _by_layout([row for row in finals_of(rows) if row.layout not in out])
    is_final = len(finals) > 1 and _first_round_is_over(rows)
    ranking = _final_ranking(finals) if is_final else _search_ranking(candidates(rows, known, out))
    if not ranking:
        return None
    start = baseline_layout(rows)
    baseline = next((standing for standing in ranking if standing.layout == start), None)
    return Answer(ranking=tuple(ranking), is_final=is_final, baseline=baseline, out=out, drift=known)


def finals_of(rows: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """The finals that count, of rows by number: those behind every other trial."""
    searched = max((place for place, row in enumerate(rows) if row.source != "final"), default=-1)
    return list(rows[searched + 1 :])


def baseline_layout(rows: Sequence[FinishedTrial]) -> Layout | None:
    """The layout to beat; None before its trial."""
    return next((row.layout for row in rows if row.source == "baseline"), None)


def ruled_out(rows: Sequence[FinishedTrial]) -> dict[Layout, str]:
    """The layouts that measured and yet cannot win: they failed in a final, or train differently. Why."""
    failed = {
        row.layout: f"failed in the final t{row.number:04d}: {row.result.outcome}: {row.result.reason}"
        for row in finals_of(rows)
        if row.result.metrics is None and row.result.outcome not in UNFINISHED
    }
    return {**trains_differently(rows), **failed}


def trains_differently(rows: Sequence[FinishedTrial]) -> dict[Layout, str]:
    """The layouts whose losses differ from the baseline's in the same step by more than rounding explains.

    Every trial trains on the same batches, and from the same weights unless its program draws them. Nothing is out
    where no baseline completed, or where tokens are routed at random.
    """
    measured = [(row, row.result.metrics) for row in rows if row.result.metrics is not None]
    own = [(row, metrics) for row, metrics in measured if row.layout == baseline_layout(rows)]
    if not own or own[0][0].routes_at_random:
        return {}
    first, reference = own[0][0], own[0][1].losses
    spread = max(_apart(metrics.losses, reference)[0] for _, metrics in own)
    rounding = max(LOSS_TOLERANCE[first.precision], spread)
    found: dict[Layout, str] = {}
    for row, metrics in measured:
        difference, step = _apart(metrics.losses, reference)
        drawn = first.draws_weights or row.draws_weights
        allowed = max(rounding, DRAWN_TOLERANCE) if drawn else rounding
        why = f"{first.precision} and weights drawn anew explain" if drawn else f"{first.precision} explains"
        if row.layout not in found and row.layout != first.layout and difference > allowed:
            found[row.layout] = (
                f"trains differently: in step {step + 1} of t{row.number:04d} the loss is {metrics.losses[step]:.6g}, "
                f"the baseline's (t{first.number:04d}) {reference[step]:.6g}: {difference:.2%} apart, more than the "
                f"{allowed:.2g} that {why}"
            )
    return found


def _apart(losses: Sequence[float], others: Sequence[float]) -> tuple[float, int]:
    """The largest difference in one step, as a share of the other's, and that step, from 0."""
    shared = min(len(losses), len(others))
    if not shared:
        return 0.0, 0
    ours, theirs = np.array(losses[:shared]), np.array(others[:shared])
    apart = np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-12)
    step = int(apart.argmax())
    return float(apart[step]), step


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout that the search measured."""

    row: FinishedTrial
    metrics: Metrics
    """As measured."""
    factor: float
    """How much longer than at the sweep's start a step took then."""

    @property
    def step_time_ms(self) -> float:
        """With the machine's drift taken out."""
        return self.metrics.step_time_ms / self.factor


def candidates(
    rows: Sequence[FinishedTrial], drifted: Drift | None, out: Mapping[Layout, str]
) -> list[Candidate]:
    """The layouts that the search measured, fastest first; the earlier one where two are equal."""
    found = [
        Candidate(row=row, metrics=row.result.metrics, factor=drifted.factor(row) if drifted else 1.0)
        for row in counting(rows).values()
        if row.result.metrics is not None and row.layout not in out
    ]
    found.sort(key=lambda one: (one.step_time_ms, one.row.number))
    first = {one.row.layout: one for one in reversed(found)}
    return [one for one in found if first[one.row.layout] is one]


def counting(rows: Sequence[FinishedTrial]) -> dict[int, FinishedTrial]:
    """The run that counts for each trial of the search: its repeat, where the machine had disturbed it.

    Of two disturbed ones the faster counts: a disturbance only slows down.
    """
    found: dict[int, FinishedTrial] = {}
    for row in sorted(rows, key=lambda row: row.number):
        if row.source in SEARCHED:
            found[row.number] = row
        elif row.source == "repeat":
            for number, first in found.items():
                if first.layout == row.layout and first.result.suspicions:
                    found[number] = _undisturbed(first, row)
    return found


def _undisturbed(first: FinishedTrial, again: FinishedTrial) -> FinishedTrial:
    if again.result.outcome is Outcome.TOO_SLOW and not again.result.suspicions:
        return again
    ours, theirs = first.result.metrics, again.result.metrics
    if ours is None or theirs is None:
        return first
    return again if not again.result.suspicions or theirs.step_time_ms < ours.step_time_ms else first


def _search_ranking(found: Sequence[Candidate]) -> list[Standing]:
    if not found:
        return []
    best = found[0]
    return [
        Standing(
            layout=one.row.layout,
            runs=(one.row,),
            metrics=one.metrics,
            over_best=Ratio(
                value=one.step_time_ms / best.step_time_ms,
                low=one.metrics.step_time_low_ms * best.factor / one.factor / best.metrics.step_time_high_ms,
                high=one.metrics.step_time_high_ms * best.factor / one.factor / best.metrics.step_time_low_ms,
            ),
        )
        for one in found
    ]


def _first_round_is_over(rows: Sequence[FinishedTrial]) -> bool:
    """Whether every finalist has run: in each round the baseline does first, or last, and in the first one last."""
    start = next((row for row in rows if row.source == "baseline" and row.result.metrics), None)
    return start is None or any(row.layout == start.layout for row in finals_of(rows))


def _by_layout(finals: Sequence[FinishedTrial]) -> dict[Layout, list[FinishedTrial]]:
    found: dict[Layout, list[FinishedTrial]] = {}
    for row in finals:
        if row.result.metrics is not None:
            found.setdefault(row.layout, []).append(row)
    return found


def _final_ranking(finals: Mapping[Layout, Sequence[FinishedTrial]]) -> list[Standing]:
    steps = [[_metrics(row).step_times_ms for row in runs] for runs in finals.values()]
    logs, draws = pooled(steps)
    best = int(logs.argmin())
    found = []
    for place, (layout, runs) in enumerate(finals.items()):
        apart = np.quantile(draws[place] - draws[best], _TAILS) if place != best else np.zeros(2)
        low, high = np.exp(logs[place] - logs[best] + apart)
        ratio = Ratio(value=float(np.exp(logs[place] - logs[best])), low=float(low), high=float(high))
        interval = np.exp(logs[place] + np.quantile(draws[place], _TAILS))
        metrics = _together(runs, float(np.exp(logs[place])), *interval.tolist())
        found.append(Standing(layout=layout, runs=tuple(runs), metrics=metrics, over_best=ratio))
    return sorted(found, key=lambda standing: (standing.over_best.value, standing.row.number))


_TAILS: Final = (0.025, 0.975)


def pooled(layouts: Sequence[Sequence[Sequence[float]]]) -> tuple[Floats, Floats]:
    """The step times of layouts that ran several times, and how far off they may be.

    Args:
        layouts: of each layout, of each of its runs, the timed steps in ms; no run is empty.

    Returns:
        The logarithm of each layout's step time (the median over its runs of their medians), and bootstrap draws of
        its error, of shape [layouts, DRAWS].
    """
    random = np.random.default_rng(0)
    medians = [np.log([np.median(steps) for steps in runs]) for runs in layouts]
    between = _deviations(medians)
    draws = []
    for runs, logs in zip(layouts, medians, strict=True):
        within = np.array([_resampled(steps, random) for steps in runs]) - logs[:, None]
        chosen = random.integers(len(runs), size=(len(runs), DRAWS))
        errors = random.choice(between, size=(len(runs), DRAWS)) + np.take_along_axis(within, chosen, axis=0)
        draws.append(np.median(errors, axis=0))
    return np.array([np.median(logs) for logs in medians]), np.array(draws)


def _deviations(medians: Sequence[Floats]) -> Floats:
    """How far runs lie from their layout's mean, widened for how few they are.

    n deviations are too small by the root of n / (n - 1); a spread that few of them tell takes Student's quantile over
    the normal one.
    """
    repeated = [logs for logs in medians if len(logs) > 1]
    if not repeated:
        return np.zeros(1)
    freedom = sum(len(logs) - 1 for logs in repeated)
    widened = float(stdtrit(freedom, 0.975) / ndtri(0.975))
    return np.concatenate(
        [widened * (logs - logs.mean()) * np.sqrt(len(logs) / (len(logs) - 1)) for logs in repeated]
    )


def _resampled(steps_ms: Sequence[float], random: np.random.Generator) -> Floats:
    """Logarithms of the medians of steps drawn anew."""
    steps = np.asarray(steps_ms, dtype=np.float64)
    drawn = random.integers(len(steps), size=(DRAWS, len(steps)))
    found: Floats = np.log(np.median(steps[drawn], axis=1))
    return found


def _together(runs: Sequence[FinishedTrial], step_ms: float, low_ms: float, high_ms: float) -> Metrics:
    """The metrics of several runs of one layout; what is not pooled is the middle run's."""
    middle, every = _metrics(_middle(runs)), [_metrics(row) for row in runs]
    faster = middle.step_time_ms / step_ms
    starts = np.cumsum([0, *(len(one.step_times_ms) for one in every)]).tolist()
    return replace(
        middle,
        step_times_ms=tuple(ms for one in every for ms in one.step_times_ms),
        outliers=tuple(
            start + place for start, one in zip(starts, every, strict=False) for place in one.outliers
        ),
        step_time_ms=step_ms,
        step_time_low_ms=low_ms,
        step_time_high_ms=high_ms,
        tokens_per_s_per_gpu=middle.tokens_per_s_per_gpu * faster,
        model_tflops_per_s_per_gpu=middle.model_tflops_per_s_per_gpu * faster,
        mfu=None if middle.mfu is None else middle.mfu * faster,
        peak_allocated_gib=max(one.peak_allocated_gib for one in every),
        peak_reserved_gib=max(
            (one.peak_reserved_gib for one in every if one.peak_reserved_gib), default=None
        ),
    )


def _middle(runs: Sequence[FinishedTrial]) -> FinishedTrial:
    ordered = sorted(runs, key=lambda row: (_metrics(row).step_time_ms, row.number))
    return ordered[(len(ordered) - 1) // 2]


def _metrics(row: FinishedTrial) -> Metrics:
    assert row.result.metrics is not None, "only completed runs are pooled"
    return row.result.metrics
