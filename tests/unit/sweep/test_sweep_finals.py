"""Canaries, repeats and finals of whole sweeps on replayed trials, and the limits that hold for all of them."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.replay import (
    TRIAL_S,
    KilledError,
    ReplayedSweep,
    ReplayLauncher,
    Watching,
    loop_of,
    run_to_end,
    slowed,
    step_time_ms,
    sweep_of,
)
from tuner.analysis.answer import answer
from tuner.analysis.drift import drift
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep
from tuner.trial.contract import TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, read_trials

DISTURBED = (3, 5)
"""Numbers of the trials during which other jobs share the machine."""


def machine(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """Return the result on a machine that slows down by a tenth over 20 trials and is shared during two of them."""
    shared = 1.3 if spec.number in DISTURBED else 1.0
    noise = 1 + 0.0005 * (spec.number * 7 % 5 - 2)
    return slowed(result, shared * noise * (1 + spec.number / 200), ("shared",) if shared > 1 else ())


def night(trials: int = 24, **budget: Any) -> Sweep:
    more = {"finalists": 2, "final_runs": 2, "canary_every": 3, **budget}
    return sweep_of(budget={"trials": trials, **more})


def launcher(**keys: Any) -> ReplayLauncher:
    return ReplayLauncher(change=machine, **keys)


def run(loop: ReplayedSweep) -> Stop:
    return loop.run(threading.Event())


def story(results: Path) -> list[tuple[Any, ...]]:
    return [
        (trial.number, trial.source, trial.note, trial.layout, trial.result) for trial in read_trials(results)
    ]


def sources(trials: list[FinishedTrial]) -> list[str]:
    return [trial.source for trial in sorted(trials, key=lambda trial: trial.number)]


def test_a_night_is_search_with_canaries_then_repeats_then_finals(results: Path) -> None:
    loop = run_to_end(results, launcher(), night())
    order = sources(loop.trials)
    assert order[0] == "baseline"
    assert [place for place, source in enumerate(order) if source == "canary"][:2] == [4, 8]
    searched = 24 - 6 - 2
    assert set(order[:searched]) <= {"baseline", "seed", "sampler", "canary"}
    assert order[searched:] == ["repeat"] * 2 + ["final"] * 6
    repeats = [trial for trial in loop.trials if trial.source == "repeat"]
    assert {trial.note for trial in repeats} == {f"of t{number:04d}" for number in DISTURBED}


def test_the_finals_interleave_the_fastest_and_the_baseline_and_give_the_answer(results: Path) -> None:
    loop = run_to_end(results, launcher(), night())
    finals = [trial for trial in loop.trials if trial.source == "final"]
    layouts = [trial.layout for trial in finals]
    assert layouts[:3] == layouts[:2:-1]
    assert layouts[2] == loop.trials[0].layout
    final = answer(loop.trials)
    assert final is not None and final.is_final and final.baseline is not None
    assert final.best.layout == min({*layouts}, key=step_time_ms)
    measured = final.baseline.metrics.step_time_ms / final.best.metrics.step_time_ms
    true = step_time_ms(final.baseline.layout) / step_time_ms(final.best.layout)
    assert measured == pytest.approx(true, rel=0.02)


def test_the_canaries_show_the_drift_of_the_machine(results: Path) -> None:
    loop = run_to_end(results, launcher(), night(trials=40, canary_every=2))
    seen = drift(loop.trials)
    assert seen is not None and seen.is_significant
    assert seen.change_low < seen.change < seen.change_high
    last = max(trial.number for trial in loop.trials if trial.source == "canary")
    assert seen.change == pytest.approx(last / 200, rel=0.1)


@pytest.fixture(scope="module")
def uninterrupted(in_memory: Path) -> list[tuple[Any, ...]]:
    results = in_memory / "night"
    run_to_end(results, launcher(), night())
    return story(results)


@pytest.mark.parametrize("number", [4, 9, 16, 19])
def test_a_sweep_killed_in_any_part_resumes_as_if_it_never_was(
    results: Path, number: int, uninterrupted: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, launcher(script={number: [KilledError]}), night()))
    run_to_end(results, launcher(), night())
    assert story(results) == uninterrupted


def test_a_sweep_that_has_ended_runs_nothing_more(results: Path) -> None:
    run_to_end(results, launcher(), night())
    again = launcher()
    assert run(loop_of(results, again, night())) is Stop.TRIALS
    assert again.launched == []


def test_a_larger_budget_continues_the_search_and_runs_the_finals_again(results: Path) -> None:
    run_to_end(results, launcher(), night())
    loop = run_to_end(results, launcher(), night(trials=34))
    order = sources(loop.trials)[24:]
    assert order[-6:] == ["final"] * 6
    assert set(order[:-6]) <= {"sampler", "seed", "canary"}


def test_only_trials_of_the_search_may_give_up(results: Path) -> None:
    replay = launcher()
    loop = run_to_end(results, replay, night(canary_every=None))
    by_number = {trial.number: trial for trial in loop.trials}
    limits = {spec.number: spec.give_up_above_ms for spec in replay.launched}
    assert limits[0] is None
    start = by_number[0].result.metrics
    assert start is not None
    assert limits[1] == start.step_time_high_ms
    for number, trial in by_number.items():
        assert (limits[number] is None) == (trial.source in ("baseline", "canary", "repeat", "final"))
    best_ms = min(
        trial.result.metrics.step_time_high_ms
        for trial in loop.trials
        if trial.result.metrics and trial.number < 15 and not trial.result.suspicions
    )
    assert limits[15] == best_ms


def test_the_step_time_above_which_trials_give_up_follows_the_drift(results: Path) -> None:
    replay = launcher()
    loop = run_to_end(results, replay, night(trials=40, canary_every=2))
    canary = max(trial.number for trial in loop.trials if trial.source == "canary")
    limits = {spec.number: spec.give_up_above_ms for spec in replay.launched}
    limit = limits[canary + 1]
    fastest = min(
        step_time_ms(trial.layout) for trial in loop.trials if trial.number < canary and trial.result.metrics
    )
    assert limit == pytest.approx((fastest + 0.1) * (1 + canary / 200), rel=0.01)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"trials": 20}, Stop.TRIALS),
        ({"trials": 99, "hours": 20.5 * TRIAL_S / 3600}, Stop.HOURS),
        ({"trials": 99, "gpu_hours": 8 * 20.5 * TRIAL_S / 3600}, Stop.GPU_HOURS),
        (
            {"trials": 99, "hours": 20.5 * TRIAL_S / 3600, "gpu_hours": 8 * 10 * TRIAL_S / 3600},
            Stop.GPU_HOURS,
        ),
    ],
)
def test_a_sweep_with_finals_keeps_its_limits_to_within_one_trial(
    results: Path, budget: dict[str, Any], reason: Stop
) -> None:
    sweep = night(**budget)
    loop = loop_of(results, launcher(), sweep)
    assert run(loop) is reason
    limit = min(20, 11 if reason is Stop.GPU_HOURS and "hours" in budget else 21)
    assert limit - 1 <= len(loop.trials) <= limit + 1
    finals = Counter(trial.layout for trial in loop.trials if trial.source == "final")
    assert set(finals.values()) == {2}
    assert len(finals) >= 2


class FakeTime:
    """A clock that only trials advance."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s

    def trial(self, spec: TrialSpec, result: TrialResult) -> TrialResult:
        self.now_s += TRIAL_S
        return machine(spec, result)


@pytest.mark.parametrize("trials", [4, 5.5, 12, 20.5, 30])
def test_the_search_and_the_finals_end_by_the_deadline(results: Path, trials: float) -> None:
    clock = FakeTime()
    deadline_s = clock.now_s + trials * TRIAL_S
    replay = ReplayLauncher(change=clock.trial)
    loop = loop_of(results, replay, night(trials=99, canary_every=None), deadline_s=deadline_s, clock=clock)
    assert run(loop) is Stop.DEADLINE
    assert clock.now_s <= deadline_s
    order = sources(loop.trials)
    assert len(order) >= int(trials) - 2
    expected = 6 if trials >= 12 else 4 if trials >= 8 else 0
    assert order.count("final") == expected
    assert order[len(order) - expected :] == ["final"] * expected
    assert (loop.finals_note() is None) == (expected == 6)


def test_finals_that_are_killed_before_a_deadline_resume(results: Path) -> None:
    clock = FakeTime()
    deadline_s = clock.now_s + 20.5 * TRIAL_S
    sweep = night(trials=99, canary_every=None)
    killed = ReplayLauncher(change=clock.trial, script={16: [KilledError]})
    with pytest.raises(KilledError):
        run(loop_of(results, killed, sweep, deadline_s=deadline_s, clock=clock))
    loop = loop_of(results, ReplayLauncher(change=clock.trial), sweep, deadline_s=deadline_s, clock=clock)
    assert sources(loop.trials)[-1] == "final"
    run(loop)
    order = sources(loop.trials)
    first = order.index("final")
    assert order[first:] == ["final"] * 6


def test_a_sweep_that_converges_keeps_its_budget_for_whole_finals(results: Path) -> None:
    sweep = night(trials=60, min_gain=0.05, confidence=0.9, finalists=3, final_runs=3)
    loop = loop_of(results, launcher(), sweep)
    assert run(loop) is Stop.CONVERGED
    order = sources(loop.trials)
    assert order[-12:] == ["final"] * 12
    assert order.count("final") == 12


def test_finals_that_do_not_fit_are_smaller_and_a_note_says_so(results: Path) -> None:
    loop = run_to_end(results, launcher(), night(trials=8, finalists=3, final_runs=3, canary_every=None))
    order = sources(loop.trials)
    assert order.count("final") == 4
    note = loop.finals_note()
    assert note is not None and "1 and the baseline run 2 times each" in note


def test_a_note_says_that_interrupted_finals_are_not_complete(results: Path) -> None:
    loop = loop_of(results, launcher(stop_at=20), night())
    assert run(loop) is Stop.INTERRUPTED
    note = loop.finals_note()
    assert note == "The finals are not complete: 2 of 6 trials ran."


def test_finals_measure_as_the_sweep_says_and_do_not_change_the_certainty(results: Path) -> None:
    replay, watching = launcher(), Watching()
    loop = loop_of(results, replay, night(), observer=watching)
    run(loop)
    finals = [spec for spec in replay.launched if spec.number >= 18]
    assert all(spec.measurement == night().measurement for spec in finals)
    certainties = [progress.certainty for progress in watching.progress]
    assert len({certainty.gain(0.95) for certainty in certainties[-8:] if certainty is not None}) == 1


def test_progress_states_the_time_that_the_tuner_itself_takes(results: Path) -> None:
    watching = Watching()
    run(loop_of(results, launcher(), night(trials=4), observer=watching))
    last = watching.progress[-1]
    assert 0 < last.own_s <= last.run_s


def test_grid_refinement_and_finals_share_the_time_before_a_deadline(results: Path) -> None:
    clock = FakeTime()
    deadline_s = clock.now_s + 26.5 * TRIAL_S
    budget = {"trials": 99, "finalists": 2, "final_runs": 2}
    replay = ReplayLauncher(change=clock.trial)
    loop = loop_of(results, replay, sweep_of(knobs=None, budget=budget), deadline_s=deadline_s, clock=clock)
    assert run(loop) is Stop.DEADLINE
    assert clock.now_s <= deadline_s
    order = sources(loop.trials)
    began = next(place for place, trial in enumerate(loop.trials) if trial.around)
    searched = order.index("repeat")
    assert order[searched:] == ["repeat"] * 2 + ["final"] * 6
    assert began == pytest.approx(0.6 * searched, abs=1)
