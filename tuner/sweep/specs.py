"""The spec of a trial of a sweep, and the record of a trial that has ended."""

from tuner.core.layout import Layout
from tuner.sweep.configuration import Sweep
from tuner.sweep.state import RunningTrial
from tuner.trial.contract import TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, draws_weights


def trial_spec(
    sweep: Sweep, number: int, attempt: int, layout: Layout, give_up_above_ms: float | None = None
) -> TrialSpec:
    """The spec of one trial of a sweep."""
    return TrialSpec(
        sweep=sweep.name,
        number=number,
        attempt=attempt,
        workload=sweep.workload,
        cluster=sweep.cluster,
        layout=layout,
        program=sweep.program,
        measurement=sweep.measurement,
        limits=sweep.limits,
        seed=sweep.seed,
        give_up_above_ms=give_up_above_ms,
    )


def finished_trial(sweep: Sweep, trial: RunningTrial, result: TrialResult) -> FinishedTrial:
    """The record of a trial of a sweep that ended with this result."""
    return FinishedTrial(
        number=trial.number,
        source=trial.source.source,
        note=trial.source.note,
        around=trial.source.around,
        layout=trial.layout,
        precision=sweep.workload.precision,
        draws_weights=draws_weights(sweep.program, sweep.workload, trial.layout),
        routes_at_random=sweep.workload.moe_router_force_load_balancing,
        result=result,
    )
