"""Finds layouts that train differently, by comparing the losses of every layout with the baseline's, step by step."""

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
"""The largest relative difference between the losses of two layouts in one step that rounding explains. Layouts add up
numbers in different orders, so their rounding differs.

fp32 and bf16 are measured: in tests/integration/test_parity.py, 60 layouts stay within 1e-4 (fp32) and 2e-3 (bf16) over
3 steps, and sweeps of tiny models in fp32 stayed below 1e-7 over 13 steps. The others are assumed, and larger for
coarser rounding. If the baseline's own runs differ by more, that larger difference is tolerated.
"""

DRAWN_TOLERANCE: Final = 0.05
"""The largest relative difference between the losses of two layouts in one step that is tolerated if the initial
weights depend on the layout (`tuner.trial.finished.draws_weights`).

Megatron then seeds weights by tensor and pipeline rank, so every layout starts from different weights: over ten steps
of a tiny recipe of Megatron Bridge, the losses of tp 1 and tp 2 differed by up to 0.55% (measured). The tolerance is
assumed: a layout that trains correctly stays within it, and a layout that loses gradients or tokens soon exceeds it.
"""


def trains_differently(trials: Sequence[FinishedTrial]) -> dict[Layout, str]:
    """Return the layouts whose losses differ from the baseline's by more than is tolerated, each with the reason.

    Losses can be compared since every trial trains on the same batches and, with some programs, starts from the same
    weights. The result is empty if no baseline completed, or if the workload routes tokens at random.
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
            f"{baseline.precision} and other initial weights explain"
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
    """Return the largest relative difference of losses that is tolerated for layouts with the same initial weights.

    It is that of the precision, or that between the baseline's own runs if it is larger.
    """
    own_differences = _largest_differences([metrics.losses for metrics in runs], runs[0].losses)
    return max(LOSS_TOLERANCE[baseline.precision], *(difference for difference, _ in own_differences))


def _largest_differences(
    losses: Sequence[Sequence[float]], reference: Sequence[float]
) -> list[tuple[float, int]]:
    """Return, for each run, its largest relative difference from the reference in one step, and the index of that step.

    Args:
        losses: the losses of each run, one per step.
        reference: the losses with which each run is compared; steps that only one of the two has are left out.
    """
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
