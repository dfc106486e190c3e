"""The refinement of a default search: the rows that it adds, and when the loop comes to it."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.replay import (
    KilledError,
    ReplayedSweep,
    ReplayLauncher,
    Watching,
    loop_of,
    run_to_end,
    slowed,
    step_time_ms,
    sweep_of,
    table_of,
)
from tests.trials import completed_row
from tests.unit.search.default_sweeps import (
    built_in_grid,
    built_in_sweep,
    default_sweep,
    layout_key,
    layout_keys,
)
from tuner.analysis.centres import refinement_centres
from tuner.analysis.figures import best_trial
from tuner.analysis.verdict import verdict
from tuner.core.layout import KNOBS, Layout
from tuner.errors import InputError
from tuner.explain.evidence import gather
from tuner.predict.time.step import step_time_ms as predicted_ms
from tuner.search.grid import GRID_SHARE
from tuner.search.refinement import MAX_CENTRES, centre_layouts, with_refinements
from tuner.search.variants import variants_of
from tuner.space.domain import REFINED
from tuner.space.table import find_row, layout_at
from tuner.sweep.budget import Deadline, Ledger, Stop
from tuner.sweep.configuration import Budget, Sweep
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, TrialSource, read_trials
from tuner.trial.program import NOT_BUILT_IN

GRID_KNOBS = [knob for knob in KNOBS if knob not in REFINED]


def test_the_table_grows_at_its_end_by_the_variants_that_it_does_not_hold() -> None:
    sweep, table = built_in_sweep("tiny-gpt"), built_in_grid("tiny-gpt")
    centres = [layout_at(table, row) for row in (0, 1, 2)]
    grown = with_refinements(table, centres, sweep.problem)
    assert len(layout_keys(grown)) == len(grown) > len(table)
    pd.testing.assert_frame_equal(grown.head(len(table)), table, check_categorical=False)
    variants = [layout_keys(variants_of(centre, sweep.problem).table) for centre in centres]
    assert layout_keys(grown) == layout_keys(table).union(*variants)
    assert with_refinements(table, [], sweep.problem) is table
    assert with_refinements(table, centres, replace(sweep, refined=()).problem) is table


def test_variants_that_are_predicted_not_to_fit_are_left_out() -> None:
    sweep, table = built_in_sweep("tiny-gpt"), built_in_grid("tiny-gpt")
    small = replace(sweep, cluster=replace(sweep.cluster, gpu=replace(sweep.cluster.gpu, memory_gib=0.02)))
    centres = [layout_at(table, 0)]
    all_variants = with_refinements(table, centres, small.problem)
    fitting = with_refinements(table, centres, small.problem, least_fit=0.01)
    assert len(table) <= len(fitting) < len(all_variants)


def test_only_a_sweep_that_names_no_knobs_has_a_refinement_and_it_leaves_out_fixed_knobs() -> None:
    assert sweep_of().refined == ()
    sweep = default_sweep(fixed={"overlap_grad_reduce": False, "overlap_param_gather": False})
    fixed = {"overlap_grad_reduce", "overlap_param_gather"}
    assert set(REFINED) - set(sweep.refined) == {*fixed, *NOT_BUILT_IN}


def test_the_last_trials_say_which_layouts_are_the_centres() -> None:
    of_grid, of_refinement = TrialSource(source="sampler"), TrialSource(source="sampler", around=(2, 0))
    assert refinement_centres([of_grid, of_grid]) == ()
    assert refinement_centres([of_grid, of_refinement, of_grid]) == (2, 0)
    assert centre_layouts((2, 0), [Layout(tp=1), Layout(tp=2), Layout(tp=4)]) == [Layout(tp=4), Layout(tp=1)]
    with pytest.raises(InputError, match=r"centred on trial 7, but there are 1 trials"):
        centre_layouts((7,), [Layout()])


TRIALS = 12
GRID_TRIALS = 8
"""60% of 12, rounded up."""


def better_in_refinement(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """A machine on which gathering parameters ahead slows every step by a quarter: only the refinement can see it."""
    return slowed(result, 1.25 if spec.layout.overlap_param_gather else 1.0)


def as_predicted(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """A machine that the predictor knows, to a percent."""
    row = pd.DataFrame([dict(zip(KNOBS, layout_key(spec.layout), strict=True))])
    predicted = predicted_ms(row, spec.workload, spec.cluster, "transformer_engine")[0]
    return slowed(result, predicted / step_time_ms(spec.layout) * (1 + 0.002 * (spec.number * 7 % 11 - 5)))


def launcher(**keys: Any) -> ReplayLauncher:
    return ReplayLauncher(change=better_in_refinement, **keys)


def night(**keys: Any) -> Sweep:
    return default_sweep(**{"budget": {"trials": TRIALS}, **keys})


def run(loop: ReplayedSweep) -> Stop:
    return loop.run(threading.Event())


def story(results: Path) -> list[FinishedTrial]:
    return read_trials(results)


def refining(rows: Sequence[FinishedTrial]) -> list[int]:
    return [row.number for row in rows if row.around]


def test_the_grid_comes_first_then_its_best_few_layouts_are_refined(results: Path) -> None:
    watching, sweep = Watching(), night()
    loop = loop_of(results, launcher(), sweep, observer=watching)
    assert run(loop) is Stop.TRIALS
    assert GRID_TRIALS - 1 < GRID_SHARE * TRIALS <= GRID_TRIALS
    assert refining(loop.trials) == list(range(GRID_TRIALS, TRIALS))
    (numbers,) = {row.around for row in loop.trials[GRID_TRIALS:]}
    assert len(numbers) == MAX_CENTRES
    fastest: dict[tuple[Any, ...], int] = {}
    for row in sorted(loop.trials[:GRID_TRIALS], key=lambda row: step_time_ms(row.layout)):
        fastest.setdefault(tuple(getattr(row.layout, knob) for knob in GRID_KNOBS), row.number)
    assert set(numbers) == set(list(fastest.values())[:MAX_CENTRES])
    table = table_of(sweep)
    assert all(find_row(table, row.layout) is not None for row in loop.trials[:GRID_TRIALS])
    grown = with_refinements(table, [loop.trials[number].layout for number in numbers], sweep.problem)
    assert all(find_row(grown, row.layout) is not None for row in loop.trials)
    assert any(find_row(table, row.layout) is None for row in loop.trials[GRID_TRIALS:])
    assert len({row.layout for row in loop.trials}) == TRIALS
    parts = ["grid"] * 2 * GRID_TRIALS + ["refinement"] * 2 * (TRIALS - GRID_TRIALS)
    assert [progress.part for progress in watching.progress] == parts
    known = [progress.certainty.searched for progress in watching.progress if progress.certainty]
    assert sorted(set(known)) == ["the grid", "the grid and its refinement"]
    assert known == sorted(known)
    names = ", ".join(f"t{number:04d}" for number in numbers)
    assert any(
        f"From t{GRID_TRIALS:04d} on, the refinement" in told and names in told
        for told in verdict(loop.trials)
    )


def test_the_refinement_finds_what_the_grid_does_not_hold(results: Path) -> None:
    loop = run_to_end(results, launcher(), night(budget={"trials": 30}))
    winner = best_trial(loop.trials)
    assert winner is not None
    assert not winner.layout.overlap_param_gather
    assert winner.around


@pytest.fixture(scope="module")
def uninterrupted(in_memory: Path) -> list[FinishedTrial]:
    results = in_memory / "refined"
    run_to_end(results, launcher(), night())
    return story(results)


@pytest.mark.parametrize("number", [GRID_TRIALS - 1, GRID_TRIALS, GRID_TRIALS + 2])
def test_killed_in_the_grid_or_the_refinement_the_sweep_goes_on_as_if_it_never_was(
    results: Path, number: int, uninterrupted: list[FinishedTrial]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, launcher(script={number: [KilledError]}), night()))
    run_to_end(results, launcher(), night())
    assert story(results) == uninterrupted


@pytest.mark.parametrize("number", [GRID_TRIALS])
def test_killed_before_a_trials_spec_is_written_it_goes_on_too(
    results: Path, number: int, uninterrupted: list[FinishedTrial]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, launcher(script={number: [KilledError]}), night()))
    SweepFolder(results).trial(number).spec.unlink()
    run_to_end(results, launcher(), night())
    assert story(results) == uninterrupted


def test_a_deleted_study_is_rebuilt_over_the_grid_and_its_refinement(
    results: Path, uninterrupted: list[FinishedTrial]
) -> None:
    run_to_end(results, launcher(), night(budget={"trials": TRIALS}), with_study=True)
    SweepFolder(results).study.unlink()
    loop = run_to_end(results, launcher(), night(budget={"trials": TRIALS + 3}), with_study=True)
    assert loop.trials[:TRIALS] == uninterrupted
    assert {row.around for row in loop.trials[GRID_TRIALS:]} == {uninterrupted[-1].around}
    assert len(loop.trials) == TRIALS + 3


def test_a_grid_with_nothing_left_leaves_its_budget_to_the_refinement(results: Path) -> None:
    fixed = {"tp": 2, "pp": 1, "cp": 1, "sp": True, "micro_batch_size": 2}
    sweep = night(fixed=fixed, budget={"trials": 30})
    first = len(table_of(sweep))
    assert first < 10
    loop = run_to_end(results, launcher(), sweep)
    assert refining(loop.trials)[0] == first
    assert all(getattr(row.layout, knob) == value for row in loop.trials for knob, value in fixed.items())


def test_a_grid_that_converges_leaves_its_budget_to_the_refinement(results: Path) -> None:
    sweep = night(budget={"trials": 60, "min_gain": 0.1, "confidence": 0.9})
    loop = loop_of(results, ReplayLauncher(change=as_predicted), sweep)
    assert run(loop) is Stop.CONVERGED
    began = refining(loop.trials)
    assert 5 <= began[0] < GRID_SHARE * 60
    assert began[-1] < 59
    certainty = loop.progress().certainty
    assert certainty is not None
    assert "best of the grid and its refinement with probability 90%" in certainty.sentence(0.9)
    again = loop_of(results, ReplayLauncher(change=as_predicted), sweep)
    assert run(again) is Stop.CONVERGED
    assert again.trials == loop.trials


def test_where_nothing_is_measured_there_is_nothing_to_refine(results: Path) -> None:
    sweep = night(fixed={"tp": 2, "cp": 1}, budget={"trials": 12})
    loop = loop_of(results, ReplayLauncher(limit_gib=0.1), sweep)
    assert run(loop) in (Stop.EXHAUSTED, Stop.TRIALS)
    assert refining(loop.trials) == []
    assert {row.result.outcome for row in loop.trials} == {Outcome.OOM}


def test_finals_come_after_the_grid_and_the_refinement(results: Path) -> None:
    budget = {"trials": 20, "finalists": 2, "final_runs": 2, "canary_every": 4}
    loop = run_to_end(results, launcher(), night(budget=budget))
    order = [row.source for row in loop.trials]
    assert order[-6:] == ["final"] * 6
    assert "final" not in order[:-6]
    began = refining(loop.trials)
    assert began == list(range(began[0], 20))
    assert began[0] == 9, "60% of the 14 trials that the search may take"
    loop = run_to_end(results, launcher(), night(budget={**budget, "trials": 24}))
    assert {row.around for row in loop.trials[began[0] :]} == {loop.trials[-1].around}


def test_the_evidence_of_a_sweep_holds_what_its_refinement_could_try(
    in_memory: Path, uninterrupted: list[FinishedTrial]
) -> None:
    evidence = gather(night(), uninterrupted)
    sweep = night()
    found = [uninterrupted[number].layout for number in uninterrupted[-1].around]
    assert layout_keys(evidence.table) >= layout_keys(with_refinements(table_of(sweep), found, sweep.problem))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_every_sampler_goes_on_over_the_grown_table(results: Path, sampler: str) -> None:
    loop = run_to_end(results, launcher(), night(sampler=sampler))
    assert refining(loop.trials) == list(range(GRID_TRIALS, TRIALS))
    assert len({row.layout for row in loop.trials}) == TRIALS


@pytest.mark.parametrize(
    ("budget", "deadline_s"),
    [
        (Budget(trials=20, finalists=0), None),
        (Budget(trials=99, finalists=0, hours=300 / 3600), None),
        (Budget(trials=99, finalists=0, gpu_hours=8 * 300 / 3600), None),
        (Budget(trials=99, finalists=0), 300.0),
        (Budget(trials=26, finalists=2, final_runs=2), None),
    ],
)
def test_the_grid_ends_with_its_share_of_whatever_the_search_may_use(
    budget: Budget, deadline_s: float | None
) -> None:
    """20 trials of the search, of 15 s each."""

    def ledger(count: int) -> Ledger:
        trials = tuple(completed_row(number, 100.0) for number in range(count))
        deadline = deadline_s and Deadline(began_s=0.0, now_s=15.0 * count, deadline_s=deadline_s)
        return Ledger(budget=budget, world_size=8, trials=trials, lost_s=0.0, deadline=deadline or None)

    assert ledger(11).search_is_over(0.6) is None
    assert ledger(12).search_is_over(0.6) is not None
    assert ledger(19).search_is_over() is None
    assert ledger(20).search_is_over() is not None
