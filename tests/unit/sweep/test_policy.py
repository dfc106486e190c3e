"""What a sweep does next follows from its state: whole sweeps, one trial at a time and several at once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.drive import Drive, knowledge, resumed_at
from tests.replay import TRIAL_S, ReplayLauncher, replayed, run_to_end, slowed, sweep_of
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep
from tuner.sweep.policy import SIDE_BY_SIDE, Finish, Launch, Wait
from tuner.sweep.state import (
    FAILURES_TO_STOP,
    AttemptFailed,
    Halt,
    HaltAsked,
    SweepState,
    advanced,
)
from tuner.trial.contract import Outcome, TrialResult, TrialSpec
from tuner.trial.finished import SEARCHED, FinishedTrial

SMALL: dict[str, Any] = {
    "tp": [1, 2, 4],
    "pp": [1, 2],
    "micro_batch_size": [1, 2],
}


def night(trials: int = 14, **keys: Any) -> Sweep:
    """A sweep with canaries, repeats and finals."""
    budget = {"trials": trials, "finalists": 2, "final_runs": 2, "canary_every": 3, **keys.pop("budget", {})}
    return sweep_of(knobs=SMALL, budget=budget, **keys)


def limited(spec: TrialSpec) -> TrialResult:
    """A machine on which some layouts run out of memory, and one trial is disturbed."""
    result = replayed(spec, limit_gib=40.0)
    return slowed(result, 1.3, ("shared",)) if spec.number == 2 else result


def story(trials: tuple[FinishedTrial, ...]) -> list[tuple[object, ...]]:
    return [(trial.number, trial.source, trial.layout, trial.result.outcome) for trial in trials]


def test_driven_without_files_a_sweep_is_the_one_that_the_controller_runs(
    results: Path,
) -> None:
    sweep = night()
    drive = Drive(sweep=sweep, machine=limited)
    launcher = ReplayLauncher(limit_gib=40.0, change=lambda spec, result: limited(spec))
    loop = run_to_end(results, launcher, sweep)
    assert drive.to_end() is Stop.TRIALS
    assert story(drive.state.ended) == story(tuple(loop.trials))


@settings(max_examples=12)
@given(slots=st.integers(1, 3), seed=st.integers(0, 99), trials=st.integers(1, 16))
def test_however_many_trials_run_at_once_what_always_holds_still_holds(
    slots: int, seed: int, trials: int
) -> None:
    drive = Drive(sweep=night(trials), machine=limited, slots=slots, seed=seed)
    for _ in drive.steps():
        running = drive.state.running
        assert len(running) <= slots
        alone = [trial for trial in running if trial.source.source not in SIDE_BY_SIDE]
        assert not alone or len(running) == 1, (
            "a measurement that others are compared with ran beside another"
        )
    searched = [trial.layout for trial in drive.launched if trial.source.source in SEARCHED]
    assert len(searched) == len(set(searched)), "a row was searched twice"
    assert len(drive.state.ended) <= trials
    assert [trial.number for trial in drive.state.ended] == list(range(len(drive.state.ended)))
    finals = Counter(trial.layout for trial in drive.state.ended if trial.source == "final")
    assert len(set(finals.values())) <= 1, "every finalist runs as often as the others"


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("budget", [{"hours": 7.5 * TRIAL_S / 3600}, {"gpu_hours": 8 * 7.5 * TRIAL_S / 3600}])
def test_budgets_of_time_hold_to_within_the_trials_that_run_at_once(
    slots: int, budget: dict[str, float]
) -> None:
    drive = Drive(sweep=sweep_of(knobs=SMALL, budget={"trials": 99, **budget}), slots=slots)
    assert drive.to_end() in (Stop.HOURS, Stop.GPU_HOURS)
    assert 7.5 * TRIAL_S <= drive.policy.ledger(drive.state, 0.0).used_s <= (7.5 + slots) * TRIAL_S


def test_two_at_a_time_need_few_trials_more_than_one_to_the_optimum() -> None:
    best = min(_step_time(trial) for trial in _exhausted(1).ended)
    needed = [
        next(place for place, trial in enumerate(_exhausted(slots).ended, 1) if _step_time(trial) == best)
        for slots in (1, 2)
    ]
    assert needed[1] <= needed[0] + 2


def _exhausted(slots: int) -> SweepState:
    drive = Drive(sweep=sweep_of(knobs=SMALL, budget={"trials": 99}), slots=slots)
    assert drive.to_end() is Stop.EXHAUSTED
    return drive.state


def _step_time(trial: FinishedTrial) -> float:
    assert trial.result.metrics is not None
    return trial.result.metrics.step_time_ms


@settings(max_examples=4, phases=[Phase.generate])
@given(slots=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_searcher_rebuilt_from_the_state_knows_what_one_that_watched_knows(slots: int, seed: int) -> None:
    drive = Drive(sweep=night(), machine=limited, slots=slots, seed=seed)
    for step, _ in enumerate(drive.steps()):
        if step % 5 == 0:
            rebuilt = drive.search.searcher(drive.state)
            number = drive.state.next_number
            assert knowledge(rebuilt, number) == knowledge(drive.searcher, number)


@settings(max_examples=8)
@given(step=st.integers(0, 30), seed=st.integers(0, 9))
def test_killed_after_any_step_one_at_a_time_goes_on_as_if_it_never_was(step: int, seed: int) -> None:
    whole = Drive(sweep=night(), machine=limited)
    whole.to_end()
    killed = Drive(sweep=night(), machine=limited, seed=seed)
    for _, reason in zip(range(step + 1), killed.steps(), strict=False):
        if reason is not None:
            break
    again = Drive(sweep=night(), machine=limited, state=resumed_at(killed.state))
    again.to_end()
    assert story(again.state.ended) == story(whole.state.ended)


@settings(max_examples=8)
@given(step=st.integers(0, 30), seed=st.integers(0, 99))
def test_killed_with_two_in_flight_nothing_is_lost_and_nothing_runs_twice(step: int, seed: int) -> None:
    killed = Drive(sweep=night(), machine=limited, slots=2, seed=seed)
    for _, reason in zip(range(step + 1), killed.steps(), strict=False):
        if reason is not None:
            break
    kept = story(killed.state.ended)
    again = Drive(sweep=night(), machine=limited, slots=2, seed=seed, state=resumed_at(killed.state))
    again.to_end()
    assert set(kept) <= set(story(again.state.ended))
    over = {number for number, *_ in kept}
    assert over.isdisjoint(trial.number for trial in again.launched)
    searched = [trial.layout for trial in again.state.ended if trial.source in SEARCHED]
    assert len(searched) == len(set(searched))


def test_the_first_of_two_waiting_trials_runs_first_and_a_second_attempt_needs_no_budget() -> None:
    drive = Drive(sweep=sweep_of(knobs=SMALL, budget={"trials": 9}), slots=2)
    for _ in drive.steps():
        if len(drive.state.running) == 2:
            break
    first, second = drive.state.running
    lost = TrialResult(outcome=Outcome.COMMUNICATION, reason="lost")
    state = advanced(
        advanced(drive.state, AttemptFailed(second.number, lost)), AttemptFailed(first.number, lost)
    )
    used_up = replace(drive.policy, budget=replace(drive.policy.budget, hours=1e-9))
    action = used_up.next_action(state, drive.searcher, 2, 0.0)
    assert isinstance(action, Launch)
    assert (action.trial.number, action.trial.attempt) == (first.number, 2)


def test_three_failures_of_the_machine_end_the_sweep_once_nothing_runs() -> None:
    drive = Drive(sweep=sweep_of(knobs=SMALL), slots=2)
    for _ in drive.steps():
        if len(drive.state.running) == 2:
            break
    broken = replace(drive.state, failures=FAILURES_TO_STOP)
    assert isinstance(drive.policy.next_action(broken, drive.searcher, 0, 0.0), Wait)
    over = drive.policy.next_action(replace(broken, running=()), drive.searcher, 2, 0.0)
    assert over == Finish(Stop.BREAKER)


@pytest.mark.parametrize(
    ("halt", "while_running", "once_idle"),
    [
        (Halt.PAUSED, Wait(), Wait()),
        (Halt.CLOSING, Wait(), Finish(Stop.INTERRUPTED)),
        (Halt.STOPPING, Wait(), Finish(Stop.INTERRUPTED)),
    ],
)
def test_what_somebody_asks_is_done(halt: Halt, while_running: object, once_idle: object) -> None:
    drive = Drive(sweep=sweep_of(knobs=SMALL))
    next(iter(drive.steps()))
    asked = advanced(drive.state, HaltAsked(halt))
    assert drive.policy.next_action(asked, drive.searcher, 0, 0.0) == while_running
    assert drive.policy.next_action(replace(asked, running=()), drive.searcher, 1, 0.0) == once_idle
    if halt is Halt.PAUSED:
        on = advanced(replace(asked, running=()), HaltAsked(Halt.NONE))
        assert isinstance(drive.policy.next_action(on, drive.searcher, 1, 0.0), Launch)


def test_a_stop_is_not_taken_back() -> None:
    stopping = advanced(SweepState(), HaltAsked(Halt.STOPPING))
    assert advanced(stopping, HaltAsked(Halt.NONE)).halt is Halt.STOPPING


def test_asking_what_comes_next_changes_nothing() -> None:
    drive = Drive(sweep=night(), machine=limited)
    for step, _ in enumerate(drive.steps()):
        free = 1 - len(drive.state.running)
        if step > 6 and free:
            break
    first = drive.policy.next_action(drive.state, drive.searcher, 1, drive.now_s)
    assert all(
        drive.policy.next_action(drive.state, drive.searcher, 1, drive.now_s) == first for _ in range(3)
    )
