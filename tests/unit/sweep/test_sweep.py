"""Whole sweeps on replayed trials: what they launch and learn, when they end, and how they resume."""

import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tests.replay import (
    TRIAL_S,
    TRIALS,
    KilledError,
    Logged,
    ReplayedSweep,
    ReplayLauncher,
    Scripted,
    Watching,
    claim,
    loop_of,
    memory_gib,
    run_to_end,
    step_time_ms,
    sweep_of,
    table_of,
)
from tests.trials import CLUSTER, metrics_of
from tuner.analysis.figures import best_trial
from tuner.core.layout import KNOBS, Layout
from tuner.errors import InputError
from tuner.files import read_json
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.rules.validity import broken_rules
from tuner.search.observation import STATES
from tuner.space.table import find_row, layout_at
from tuner.sweep.budget import Stop
from tuner.sweep.configuration import Sweep
from tuner.sweep.folder import SweepFolder
from tuner.sweep.lock import hold
from tuner.sweep.state import FAILURES_TO_STOP
from tuner.trial.contract import Outcome, TrialResult, TrialSpec
from tuner.trial.finished import read_trials

LIMIT_GIB = 60.0
"""Memory of a replayed GPU in GiB; some of the layouts need more."""
THREE_ROWS: dict[str, Any] = {"knobs": {"tp": [1, 2, 4]}, "fixed": {"pp": 2}}


def run(loop: ReplayedSweep) -> Stop:
    return loop.run(threading.Event())


def story(results: Path) -> list[tuple[Any, ...]]:
    """Return what the folders say about every finished trial."""
    return [
        (trial.number, trial.source, trial.layout, trial.result.outcome, trial.result.metrics)
        for trial in read_trials(results)
    ]


def study_of(results: Path, name: str = "night") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{results / 'study.db'}").trials


def assert_study_equals_folders(results: Path) -> None:
    trials, in_study = read_trials(results), study_of(results)
    varied = {knob for knob in KNOBS if len({getattr(trial.layout, knob) for trial in trials}) > 1}
    assert [frozen.number for frozen in in_study] == [trial.number for trial in trials]
    for trial, frozen in zip(trials, in_study, strict=True):
        assert frozen.state is STATES[trial.result.outcome]
        metrics = trial.result.metrics
        assert frozen.value == (metrics.step_time_ms if metrics else None)
        assert frozen.params == {knob: getattr(trial.layout, knob) for knob in frozen.params}
        assert varied <= set(frozen.params)
        assert frozen.user_attrs["source"] == trial.source
        assert frozen.user_attrs["layout"] == trial.layout.label()
        assert frozen.user_attrs["outcome"] == trial.result.outcome.value


def test_the_baseline_runs_first_then_the_seeds_and_the_samplers_choices(results: Path) -> None:
    loop = run_to_end(results)
    sources = [trial.source for trial in loop.trials]
    assert sources[0] == "baseline"
    assert set(sources[1:]) <= {"seed", "sampler"}
    assert [trial.number for trial in loop.trials] == list(range(TRIALS))


def test_a_stated_baseline_outside_the_searched_values_runs_first(results: Path) -> None:
    sweep = sweep_of(baseline={"tp": 1, "cp": 2, "pp": 4})
    launcher = ReplayLauncher()
    loop = loop_of(results, launcher, sweep, with_study=True)
    run(loop)
    assert launcher.layouts[0] == Layout(tp=1, cp=2, pp=4)
    assert loop.trials[0].source == "baseline"
    assert launcher.layouts.count(launcher.layouts[0]) == 1
    assert_study_equals_folders(results)


def test_every_layout_of_the_table_runs_once_and_is_valid(results: Path) -> None:
    sweep, launcher = sweep_of(budget={"trials": 100}), ReplayLauncher()
    table, loop = table_of(sweep), loop_of(results, launcher, sweep)
    assert run(loop) is Stop.EXHAUSTED
    assert len(set(launcher.layouts)) == len(launcher.layouts) == len(table)
    for layout in launcher.layouts:
        assert broken_rules(layout, sweep.workload, sweep.cluster) == ()
        assert find_row(table, layout) is not None
    fastest = best_trial(loop.trials)
    assert fastest is not None
    assert fastest.layout == min((layout_at(table, row) for row in range(len(table))), key=step_time_ms)


def test_a_space_of_three_rows_is_exhausted_after_three_trials(results: Path) -> None:
    launcher, watching = ReplayLauncher(), Watching()
    loop = loop_of(results, launcher, sweep_of(**THREE_ROWS), observer=watching)
    assert run(loop) is Stop.EXHAUSTED
    assert sorted(layout.tp for layout in launcher.layouts) == [1, 2, 4]
    assert [progress.budget for progress in watching.progress] == [3] * 6
    assert [progress.finished for progress in watching.progress] == [0, 1, 1, 2, 2, 3]


def test_an_oom_rules_out_exactly_the_layouts_that_need_at_least_as_much_memory(results: Path) -> None:
    sweep, launcher, watching = sweep_of(budget={"trials": 100}), ReplayLauncher(30.0), Watching()
    table, loop = table_of(sweep), loop_of(results, launcher, sweep, observer=watching)
    assert run(loop) is Stop.EXHAUSTED
    ooms = [trial.layout for trial in loop.trials if trial.result.outcome is Outcome.OOM]
    assert ooms
    ruled_out = set()
    for layout in ooms:
        dominated = needs_at_least_as_much_memory(table, layout, sweep.workload, sweep.cluster)
        ruled_out |= {layout_at(table, int(row)) for row in dominated.nonzero()[0]}
    valid = {layout_at(table, row) for row in range(len(table))}
    assert set(launcher.layouts) == valid - (ruled_out - set(ooms))
    assert len(ruled_out) > len(ooms)
    assert (
        loop.progress().pruned == sum(pruned for _, pruned in watching.endings) == len(ruled_out - set(ooms))
    )
    assert all(memory_gib(layout) > 30.0 for layout in ruled_out)


def test_a_sweep_whose_every_trial_runs_out_of_memory_has_no_winner(results: Path) -> None:
    loop = loop_of(results, ReplayLauncher(limit_gib=0.1), sweep_of(budget={"trials": 100}), with_study=True)
    assert run(loop) is Stop.EXHAUSTED
    assert best_trial(loop.trials) is None
    assert loop.progress().best is None
    assert_study_equals_folders(results)


@pytest.mark.parametrize(
    ("budget", "trials", "reason"),
    [
        ({"trials": 4}, 4, Stop.TRIALS),
        ({"trials": 9, "hours": 2.5 * TRIAL_S / 3600}, 3, Stop.HOURS),
        ({"trials": 9, "gpu_hours": 8 * 2.5 * TRIAL_S / 3600}, 3, Stop.GPU_HOURS),
        ({"trials": 2, "hours": 1.0, "gpu_hours": 1.0}, 2, Stop.TRIALS),
    ],
)
def test_the_budget_ends_the_sweep(results: Path, budget: dict[str, Any], trials: int, reason: Stop) -> None:
    launcher, sweep = ReplayLauncher(), sweep_of(budget=budget)
    assert run(loop_of(results, launcher, sweep)) is reason
    assert launcher.numbers == list(range(trials))
    again = ReplayLauncher()
    assert run(loop_of(results, again, sweep)) is reason
    assert again.launched == []


SAMPLERS = ("random", "tpe", "gp", "grid")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_other_samplers_run_the_seeds_first_then_only_valid_untried_layouts(
    results: Path, sampler: str
) -> None:
    launcher, sweep = ReplayLauncher(LIMIT_GIB), sweep_of(sampler=sampler, budget={"trials": 12})
    loop = run_to_end(results, launcher, sweep, with_study=True)
    sources = [trial.source for trial in loop.trials]
    assert sources == sorted(sources, key=["baseline", "seed", "sampler"].index)
    assert len(set(launcher.layouts)) == 12
    assert all(find_row(table_of(sweep), layout) is not None for layout in launcher.layouts)
    assert loop.progress().certainty is None
    assert_study_equals_folders(results)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_sweep_of_another_sampler_resumes_as_if_it_never_stopped(
    results: Path, sampler: str
) -> None:
    sweep = sweep_of(sampler=sampler)
    whole = results.with_name("whole")
    run_to_end(whole, ReplayLauncher(LIMIT_GIB), sweep)
    for number in (0, 3, 6):
        launcher = ReplayLauncher(LIMIT_GIB, {number: [KilledError]})
        with pytest.raises(KilledError):
            run(loop_of(results, launcher, sweep))
    run_to_end(results, ReplayLauncher(LIMIT_GIB), sweep)
    assert story(results) == story(whole)


def test_a_sweep_stops_by_itself_near_the_best_and_states_its_certainty(results: Path) -> None:
    sweep = sweep_of(budget={"trials": 100, "min_gain": 0.05, "confidence": 0.9})
    launcher, watching = ReplayLauncher(), Watching()
    loop = loop_of(results, launcher, sweep, observer=watching)
    assert run(loop) is Stop.CONVERGED
    assert 1 < len(launcher.layouts) < len(table_of(sweep))
    winner, certainty = best_trial(loop.trials), loop.progress().certainty
    assert winner is not None
    assert certainty is not None
    assert certainty.within(0.05) >= 0.9
    fastest_ms = min(step_time_ms(layout_at(table_of(sweep), row)) for row in range(len(table_of(sweep))))
    assert step_time_ms(winner.layout) <= 1.05 * fastest_ms
    earlier = [progress.certainty for progress in watching.progress[:-1]]
    assert not any(certainty is not None and certainty.suffices(0.05, 0.9) for certainty in earlier)
    again = ReplayLauncher()
    assert run(loop_of(results, again, sweep)) is Stop.CONVERGED
    assert again.launched == []


def test_without_a_least_gain_a_sweep_tries_every_layout(results: Path) -> None:
    sweep = sweep_of(budget={"trials": 100, "min_gain": None})
    assert run(loop_of(results, ReplayLauncher(), sweep)) is Stop.EXHAUSTED


def test_an_interrupted_last_trial_runs_again_although_no_layout_is_left_to_choose(results: Path) -> None:
    launcher, sweep = ReplayLauncher(script={2: [KilledError]}), sweep_of(**THREE_ROWS)
    with pytest.raises(KilledError):
        run(loop_of(results, launcher, sweep))
    assert run(loop_of(results, launcher, sweep)) is Stop.EXHAUSTED
    assert launcher.numbers == [0, 1, 2, 2]


def test_failed_attempts_use_the_budget_too(results: Path) -> None:
    script: dict[int, Sequence[Scripted]] = {0: [Outcome.HANG], 1: [Outcome.INFRASTRUCTURE] * 2}
    sweep = sweep_of(budget={"trials": 9, "hours": 5.5 * TRIAL_S / 3600})
    loop = loop_of(results, ReplayLauncher(script=script, stop_at=2), sweep)
    assert run(loop) is Stop.INTERRUPTED
    again = loop_of(results, ReplayLauncher(), sweep)
    assert again.progress().used_s == 6 * TRIAL_S
    assert run(again) is Stop.HOURS
    assert len(again.trials) == 2


def test_progress_states_the_time_used_and_left(results: Path) -> None:
    watching = Watching()
    sweep = sweep_of(budget={"trials": 3, "hours": 1.0, "gpu_hours": 8 * 0.5})
    run(loop_of(results, ReplayLauncher(), sweep, observer=watching))
    last = watching.progress[-1]
    assert last.used_s == 3 * TRIAL_S
    assert last.left_s == 1800 - 3 * TRIAL_S
    assert last.best is not None
    assert last.best.result.metrics == metrics_of(
        min(step_time_ms(trial.layout) for trial in read_trials(results)), 0.1, memory_gib(last.best.layout)
    )
    assert watching.beats == 3


@pytest.fixture(scope="module")
def uninterrupted(in_memory: Path) -> list[tuple[Any, ...]]:
    results = in_memory / "uninterrupted"
    run_to_end(results, ReplayLauncher(LIMIT_GIB))
    return story(results)


@pytest.mark.parametrize("number", range(TRIALS))
def test_a_sweep_killed_during_any_trial_resumes_as_if_it_never_was(
    results: Path, number: int, uninterrupted: list[tuple[Any, ...]]
) -> None:
    launcher = ReplayLauncher(LIMIT_GIB, {number: [KilledError]})
    with pytest.raises(KilledError):
        run(loop_of(results, launcher, with_study=True))
    assert not SweepFolder(results).trial(number).result.exists()
    assert run(loop_of(results, launcher, with_study=True)) is Stop.TRIALS
    assert launcher.numbers == [*range(number + 1), *range(number, TRIALS)], (
        "only the killed trial runs again"
    )
    assert launcher.layouts[number] == launcher.layouts[number + 1]
    assert story(results) == uninterrupted
    assert_study_equals_folders(results)


@pytest.mark.parametrize("number", [0, 1, 5, 7])
def test_a_sweep_stopped_during_any_trial_resumes_as_if_it_never_was(
    results: Path, number: int, uninterrupted: list[tuple[Any, ...]]
) -> None:
    launcher, tracker = ReplayLauncher(LIMIT_GIB, stop_at=number), Logged()
    loop = loop_of(results, launcher, tracker=tracker)
    assert run(loop) is Stop.INTERRUPTED
    assert [trial.number for trial in loop.trials] == list(range(number))
    assert read_json(TrialResult, SweepFolder(results).trial(number).result).outcome is Outcome.INTERRUPTED
    launcher.stop_at = None
    assert run(loop_of(results, launcher, tracker=tracker)) is Stop.TRIALS
    assert launcher.numbers == [*range(number + 1), *range(number, TRIALS)]
    assert story(results) == uninterrupted
    assert tracker.logged == [*range(number), *range(number), *range(number, TRIALS)], (
        "trials before the stop, all of them again when the sweep resumes, trials after"
    )


@pytest.mark.parametrize("number", range(2, TRIALS))
def test_a_sweep_with_a_larger_budget_resumes_as_if_it_had_it_from_the_start(
    results: Path, number: int, uninterrupted: list[tuple[Any, ...]]
) -> None:
    launcher = ReplayLauncher(LIMIT_GIB)
    run_to_end(results, launcher, sweep_of(budget={"trials": number}))
    run_to_end(results, launcher)
    assert launcher.numbers == list(range(TRIALS))
    assert story(results) == uninterrupted


def test_a_trial_killed_before_its_spec_is_written_gives_its_number_to_the_next(
    results: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, ReplayLauncher(LIMIT_GIB, {4: [KilledError]}), with_study=True))
    SweepFolder(results).trial(4).spec.unlink()
    run_to_end(results, ReplayLauncher(LIMIT_GIB), with_study=True)
    assert story(results) == uninterrupted
    assert_study_equals_folders(results)


def test_every_trial_of_a_sweep_that_is_killed_often_counts_once(
    results: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    launcher = ReplayLauncher(LIMIT_GIB, {n: [KilledError] * 2 for n in (0, 3, 4, 7)})
    for _ in range(8):
        with pytest.raises(KilledError):
            run(loop_of(results, launcher))
    assert run(loop_of(results, launcher)) is Stop.TRIALS
    assert story(results) == uninterrupted


def test_a_stop_between_trials_launches_nothing(results: Path) -> None:
    stop = threading.Event()
    stop.set()
    launcher = ReplayLauncher()
    assert loop_of(results, launcher).run(stop) is Stop.INTERRUPTED
    assert launcher.launched == []


def _delete(study: Path) -> None:
    study.unlink()


def _overwrite(study: Path) -> None:
    study.write_bytes(b"no database " * 1000)


def _truncate(study: Path) -> None:
    study.write_bytes(study.read_bytes()[: study.stat().st_size // 2])


def _empty(study: Path) -> None:
    study.write_bytes(b"")


def _sql(command: str) -> Callable[[Path], None]:
    def execute(study: Path) -> None:
        with sqlite3.connect(study) as connection:
            assert connection.execute(command).rowcount > 0
        connection.close()

    return execute


@pytest.mark.parametrize(
    "damage",
    [
        _delete,
        _overwrite,
        _truncate,
        _empty,
        _sql("UPDATE trial_values SET value = 1.0 WHERE trial_id = 1"),
        _sql("UPDATE trials SET state = 'FAIL' WHERE number = 1"),
        _sql("UPDATE trials SET state = 'RUNNING' WHERE number = 2"),
        _sql(
            "UPDATE trial_params SET param_value = 1 - param_value WHERE trial_id = 4 AND param_name = 'pp'"
        ),
        _sql("DELETE FROM trials WHERE number = 5"),
        _sql("UPDATE trial_user_attributes SET value_json = '\"?\"' WHERE key = 'source'"),
        _sql("UPDATE studies SET study_name = 'another'"),
    ],
)
def test_a_study_that_is_missing_or_differs_is_rebuilt_from_the_folders(
    results: Path, damage: Callable[[Path], None], uninterrupted: list[tuple[Any, ...]]
) -> None:
    run_to_end(results, ReplayLauncher(LIMIT_GIB), sweep_of(budget={"trials": 6}), with_study=True)
    damage(SweepFolder(results).study)
    nothing_more = ReplayLauncher(LIMIT_GIB)
    run_to_end(results, nothing_more, sweep_of(budget={"trials": 6}), with_study=True)
    assert nothing_more.launched == []
    assert_study_equals_folders(results)
    run_to_end(results, ReplayLauncher(LIMIT_GIB), with_study=True)
    assert story(results) == uninterrupted
    assert_study_equals_folders(results)


def test_a_study_that_the_sweep_does_not_wait_for_holds_every_trial_in_the_end(
    results: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[tuple[Any, ...]]
) -> None:
    monkeypatch.setattr("tuner.sweep.study.MOST_AWAITED", 3)
    monkeypatch.setattr("tuner.sweep.study._CLOSING_S", 600.0)
    run_to_end(results, ReplayLauncher(LIMIT_GIB), sweep_of(budget={"trials": 6}), with_study=True)
    assert_study_equals_folders(results)
    run_to_end(results, ReplayLauncher(LIMIT_GIB), with_study=True)
    assert story(results) == uninterrupted
    assert_study_equals_folders(results)


def test_a_study_that_agrees_is_not_rebuilt(results: Path) -> None:
    run_to_end(results, with_study=True)
    before = [trial.datetime_complete for trial in study_of(results)]
    run_to_end(results, with_study=True)
    assert [trial.datetime_complete for trial in study_of(results)] == before


def test_the_study_agrees_with_the_folders_after_every_outcome(results: Path) -> None:
    script: dict[int, Sequence[Scripted]] = {
        1: [Outcome.NAN],
        2: [Outcome.INVALID],
        3: [Outcome.TIMEOUT],
        4: [Outcome.TOO_SLOW],
        5: [Outcome.HANG] * 2,
        6: [Outcome.COMMUNICATION] * 2,
    }
    run_to_end(results, ReplayLauncher(LIMIT_GIB, script), with_study=True)
    states = [trial.state for trial in study_of(results)]
    assert states[1:7] == [TrialState.FAIL, *[TrialState.PRUNED] * 4, TrialState.FAIL]
    assert_study_equals_folders(results)


@pytest.mark.parametrize("outcome", [Outcome.HANG, Outcome.COMMUNICATION])
def test_a_trial_with_a_fault_of_the_machine_runs_once_more(results: Path, outcome: Outcome) -> None:
    launcher, watching = ReplayLauncher(script={1: [outcome], 2: [outcome, outcome]}), Watching()
    loop = loop_of(results, launcher, sweep_of(budget={"trials": 4}), observer=watching)
    assert run(loop) is Stop.TRIALS
    assert [(number, attempt) for number, attempt, _ in watching.starts] == [
        (0, 1),
        *[(1, 1), (1, 2)],
        *[(2, 1), (2, 2)],
        (3, 1),
    ]
    assert [(spec.number, spec.attempt) for spec in launcher.launched] == [
        (number, attempt) for number, attempt, _ in watching.starts
    ]
    outcomes = [trial.result.outcome for trial in loop.trials]
    assert outcomes == [Outcome.COMPLETED, Outcome.COMPLETED, outcome, Outcome.COMPLETED]


@pytest.mark.parametrize(
    "outcome", [Outcome.INVALID, Outcome.TIMEOUT, Outcome.TOO_SLOW, Outcome.NAN, Outcome.OOM]
)
def test_a_trial_with_a_fault_of_the_layout_never_runs_again(results: Path, outcome: Outcome) -> None:
    launcher = ReplayLauncher(script={1: [outcome]})
    run_to_end(results, launcher, sweep_of(budget={"trials": 3}))
    run_to_end(results, launcher, sweep_of(budget={"trials": 4}))
    assert launcher.numbers == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [0, 3])
def test_three_failures_of_the_machine_in_a_row_stop_the_sweep_and_the_trial_runs_again(
    results: Path, number: int, uninterrupted: list[tuple[Any, ...]]
) -> None:
    launcher = ReplayLauncher(LIMIT_GIB, {number: [Outcome.INFRASTRUCTURE] * FAILURES_TO_STOP})
    loop = loop_of(results, launcher, with_study=True)
    assert run(loop) is Stop.BREAKER
    assert launcher.numbers == [*range(number), *[number] * FAILURES_TO_STOP]
    assert len(loop.trials) == number
    assert run(loop_of(results, launcher, with_study=True)) is Stop.TRIALS
    assert launcher.numbers[number + FAILURES_TO_STOP :] == list(range(number, TRIALS))
    assert story(results) == uninterrupted
    assert_study_equals_folders(results)


def test_a_finished_trial_resets_the_count_of_failures_of_the_machine(results: Path) -> None:
    twice = [Outcome.INFRASTRUCTURE] * (FAILURES_TO_STOP - 1)
    launcher = ReplayLauncher(script={0: twice, 1: twice})
    assert run(loop_of(results, launcher, sweep_of(budget={"trials": 2}))) is Stop.TRIALS
    assert launcher.numbers == [0, 0, 0, 1, 1, 1]


def test_three_failures_that_nobody_knows_stop_a_sweep_in_which_no_trial_has_run(results: Path) -> None:
    launcher = ReplayLauncher(script={number: [Outcome.UNEXPLAINED] for number in range(FAILURES_TO_STOP)})
    loop = loop_of(results, launcher, with_study=True)
    assert run(loop) is Stop.BREAKER
    assert len(set(launcher.layouts)) == FAILURES_TO_STOP, "three layouts failed, not one thrice"
    assert "megatune does not know this failure" in loop.controller.state.last_failure
    repaired = loop_of(results, launcher, with_study=True)
    assert run(repaired) is Stop.TRIALS
    assert launcher.numbers == [0, 1, 2, *range(TRIALS)], "once the machine is repaired, all of them run"
    assert {trial.result.outcome for trial in repaired.trials} == {Outcome.COMPLETED}
    assert_study_equals_folders(results)


def test_layouts_that_fail_for_unknown_reasons_twice_do_not_stop_the_others_for_ever(results: Path) -> None:
    launcher = ReplayLauncher(
        script={number: [Outcome.UNEXPLAINED] * 2 for number in range(FAILURES_TO_STOP)}
    )
    assert run(loop_of(results, launcher)) is Stop.BREAKER
    assert run(loop_of(results, launcher)) is Stop.BREAKER
    assert run(loop_of(results, launcher)) is Stop.TRIALS
    assert launcher.numbers == [0, 1, 2, 0, 1, 2, *range(FAILURES_TO_STOP, TRIALS)]


def test_once_a_trial_has_run_an_unknown_failure_is_the_layouts(results: Path) -> None:
    launcher = ReplayLauncher(script={number: [Outcome.UNEXPLAINED] for number in (0, 1, 3, 4, 5)})
    loop = loop_of(results, launcher, with_study=True)
    assert run(loop) is Stop.TRIALS
    assert launcher.numbers == list(range(TRIALS))
    assert_study_equals_folders(results)
    run_to_end(results, launcher)
    assert launcher.numbers == list(range(TRIALS)), "a resumed sweep does not try them again"


def occupied(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """Let others hold some of the GPUs whenever a trial runs out of memory."""
    is_oom = result.outcome is Outcome.OOM
    return replace(result, occupied_gpus=("others held 20.00 GiB of GPU 0",)) if is_oom else result


def test_an_out_of_memory_on_occupied_gpus_is_tried_once_more_and_rules_out_nothing(results: Path) -> None:
    launcher = ReplayLauncher(30.0, change=occupied)
    loop = loop_of(results, launcher, sweep_of(budget={"trials": 100}))
    assert run(loop) is Stop.EXHAUSTED
    ooms = [trial.number for trial in loop.trials if trial.result.outcome is Outcome.OOM]
    assert ooms
    assert all(launcher.numbers.count(number) == 2 for number in ooms)
    assert loop.progress().pruned == 0
    assert len(loop.trials) == len(table_of(sweep_of()))


def test_a_trial_with_a_nan_loss_is_never_the_winner(
    results: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    fastest = min(
        (trial for trial in uninterrupted if trial[4]), key=lambda trial: float(trial[4].step_time_ms)
    )
    loop = loop_of(results, ReplayLauncher(LIMIT_GIB, {fastest[0]: [Outcome.NAN]}))
    run(loop)
    winner = best_trial(loop.trials)
    assert winner is not None
    assert winner.number != fastest[0]
    assert winner.result.outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"knobs": {"tp": [1, 2, 4], "pp": [1, 2], "micro_batch_size": [1, 2, 4], "cp": [1, 2]}}),
        ({}, {"knobs": {"tp": [1, 2], "pp": [1, 2], "micro_batch_size": [1, 2, 4]}}),
        ({}, {"fixed": {"tp": 2}, "knobs": {"pp": [1, 2], "micro_batch_size": [1, 2, 4]}}),
        ({}, {"baseline": {"tp": 1, "cp": 2}}),
        ({"baseline": {"tp": 1, "cp": 2}}, {}),
    ],
)
def test_a_sweep_with_changed_knobs_resumes_with_what_it_measured(
    results: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    first, second = ReplayLauncher(LIMIT_GIB), ReplayLauncher(LIMIT_GIB)
    run_to_end(results, first, sweep_of(**before), with_study=True)
    earlier, changed = story(results), sweep_of(budget={"trials": TRIALS + 3}, **after)
    loop = run_to_end(results, second, changed, with_study=True)
    assert second.numbers[0] == TRIALS
    assert story(results)[:TRIALS] == earlier
    assert not set(first.layouts) & set(second.layouts)
    assert all(find_row(table_of(changed), layout) is not None for layout in second.layouts)
    assert {trial.number for trial in loop.trials} == {*range(TRIALS), *second.numbers}
    assert_study_equals_folders(results)


def test_an_interrupted_trial_outside_the_table_of_fewer_knobs_runs_again(results: Path) -> None:
    launcher = ReplayLauncher(script={1: [KilledError]})
    with pytest.raises(KilledError):
        run(loop_of(results, launcher, with_study=True))
    second = launcher.layouts[1]
    others = [size for size in (1, 2, 4) if size != second.micro_batch_size]
    narrower = sweep_of(knobs={"tp": [1, 2], "micro_batch_size": others}, budget={"trials": 3})
    assert find_row(table_of(narrower), second) is None
    run_to_end(results, launcher, narrower, with_study=True)
    assert launcher.numbers == [0, 1, 1, 2]
    assert launcher.layouts[2] == second
    assert_study_equals_folders(results)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (sweep_of(seed=7), "seed was 1234, is now 7"),
        (
            sweep_of(replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_gib=40.0))),
            r"cluster\.gpu\.memory_gib was 79\.1, is now 40\.0",
        ),
    ],
)
def test_the_folder_of_another_sweep_is_refused_with_the_difference(
    results: Path, other: Sweep, message: str
) -> None:
    claim(SweepFolder(results), sweep_of())
    with pytest.raises(InputError, match=message):
        claim(SweepFolder(results), other)
    claim(SweepFolder(results), sweep_of(budget={"trials": 3}))


def test_the_error_names_a_missing_trial_folder(results: Path) -> None:
    run_to_end(results, sweep=sweep_of(budget={"trials": 4}))
    shutil.rmtree(SweepFolder(results).trial(2).path)
    with pytest.raises(InputError, match=r"t0002.*t0003"):
        loop_of(results, ReplayLauncher())


def test_the_error_names_a_torn_result(results: Path) -> None:
    run_to_end(results, sweep=sweep_of(budget={"trials": 2}))
    SweepFolder(results).trial(1).result.write_text('{"outcome": ')
    with pytest.raises(InputError, match=r"t0001/result\.json: is not JSON"):
        loop_of(results, ReplayLauncher())


def test_the_spec_of_a_trial_holds_the_workload_of_the_sweep(results: Path) -> None:
    sweep, launcher = sweep_of(seed=99, budget={"trials": 2}), ReplayLauncher()
    run_to_end(results, launcher, sweep)
    for spec in launcher.launched:
        assert (spec.sweep, spec.workload, spec.cluster) == ("night", sweep.workload, sweep.cluster)
        assert (spec.measurement, spec.limits, spec.seed) == (sweep.measurement, sweep.limits, 99)
        assert read_json(TrialSpec, SweepFolder(results).trial(spec.number).spec) == spec


def test_two_sweeps_do_not_run_in_one_folder_at_once(results: Path) -> None:
    folder = SweepFolder(results)
    claim(folder, sweep_of())
    with hold(folder.lock), pytest.raises(InputError, match="another megatune"), hold(folder.lock):
        pass
    with hold(folder.lock):
        pass
