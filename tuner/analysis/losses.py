"""Whether layouts train alike: the losses of every layout compared with the baseline's, step by step. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from tuner.analysis.runs import baseline_layout
from tuner.core.layout import Layout
from tuner.core.workload import Precision
from tuner.trial.contract import Metrics
from tuner.trial.finished import FinishedTrial

LOSS_TOLERANCE: Final[Mapping[Precision, float]] = {
    "fp32": 1e-4,
    "bf16": 5e-3,
    "fp16": 5e-3,
    "fp8": 1e-2,
    "mxfp8": 1e-2,
    "nvfp4": 3e-2,
}
"""Largest relative difference between the losses of two layouts in one step. Layouts add up numbers in different
orders, so their rounding differs.

fp32 and bf16 are measured: tests/integration/test_parity.py holds 60 layouts to 1e-4 and 2e-3 over 3 steps, and sweeps
of tiny models in fp32 stayed below 1e-7 over 13 steps. The others are assumed, and wider for coarser rounding. If the
baseline's own runs differ by more, that larger difference is tolerated.
"""

DRAWN_TOLERANCE: Final = 0.05
"""Largest relative difference if the program draws the first weights itself.

Megatron seeds these weights by tensor and pipeline rank, so every layout trains from different ones: in ten steps of a
tiny recipe of Megatron Bridge, the losses of tp 1 and tp 2 came to differ by 0.55% (measured). The value itself is
assumed: a layout that trains correctly stays within it, and one that loses gradients or tokens soon leaves it.
"""


def trains_differently(trials: Sequence[FinishedTrial]) -> dict[Layout, str]:
    """Return the layouts whose losses differ from the baseline's by more than rounding explains, and why.

    Every trial trains on the same batches, and from the same weights unless its program draws them. The result is
    empty if no baseline completed, or if tokens are routed at random.
    """
    measured = [(trial, trial.result.metrics) for trial in trials if trial.result.metrics is not None]
    start = baseline_layout(trials)
    baselines = [(trial, metrics) for trial, metrics in measured if trial.layout == start]
    if not baselines or baselines[0][0].routes_at_random:
        return {}
    baseline, reference = baselines[0][0], baselines[0][1].losses
    tolerance = _tolerance(baseline, [metrics for _, metrics in baselines])
    reasons: dict[Layout, str] = {}
    differences = _largest_differences([metrics.losses for _, metrics in measured], reference)
    for (trial, metrics), (difference, step) in zip(measured, differences, strict=True):
        if difference <= tolerance:
            continue
        drawn = baseline.draws_weights or trial.draws_weights
        allowed = max(tolerance, DRAWN_TOLERANCE) if drawn else tolerance
        causes = (
            f"{baseline.precision} and weights drawn anew explain"
            if drawn
            else f"{baseline.precision} explains"
        )
        if trial.layout not in reasons and trial.layout != baseline.layout and difference > allowed:
            loss, expected = f"{metrics.losses[step]:.6g}", f"{reference[step]:.6g}"
            reasons[trial.layout] = (
                f"trains differently: in step {step + 1} of t{trial.number:04d} the loss is {loss}, "
                f"the baseline's (t{baseline.number:04d}) {expected}: {difference:.2%} apart, "
                f"more than the {allowed:.2g} that {causes}"
            )
    return reasons


def _tolerance(baseline: FinishedTrial, runs: Sequence[Metrics]) -> float:
    """Return the difference that the precision explains, or the largest one between the baseline's runs if larger."""
    own_differences = _largest_differences([metrics.losses for metrics in runs], runs[0].losses)
    return max(LOSS_TOLERANCE[baseline.precision], *(difference for difference, _ in own_differences))


def _largest_differences(
    losses: Sequence[Sequence[float]], reference: Sequence[float]
) -> list[tuple[float, int]]:
    """Return the largest difference in one step, as a share of the reference, and the index of that step, per run."""
    largest = [(0.0, 0)] * len(losses)
    for length in {len(of_run) for of_run in losses}:
        runs = [number for number, of_run in enumerate(losses) if len(of_run) == length]
        shared = min(length, len(reference))
        if not shared:
            continue
        compared, expected = np.array([losses[run] for run in runs])[:, :shared], np.array(reference[:shared])
        differences = np.abs(compared - expected) / np.maximum(np.abs(expected), 1e-12)
        steps = differences.argmax(axis=1)
        for run, step, difference in zip(runs, steps, differences.max(axis=1), strict=True):
            largest[run] = float(difference), int(step)
    return largest
