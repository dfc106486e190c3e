"""The second stage of a default search: which layouts lie around another, and how the loop comes to them."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.loader import load_cluster
from tests.replay import (
    KilledError,
    ReplayLauncher,
    Watching,
    loop_of,
    run_to_end,
    slowed,
    step_time_ms,
    sweep_of,
    table_of,
)
from tests.trials import CLUSTER, completed_row
from tuner.analysis.centres import refinement_centres
from tuner.analysis.figures import best_trial
from tuner.analysis.verdict import verdict
from tuner.core.choices import codes_of
from tuner.core.cluster import Cluster
from tuner.core.layout import KNOBS, Layout
from tuner.errors import InputError
from tuner.explain.evidence import gather
from tuner.predict.time.step import step_time_ms as predicted_ms
from tuner.rules.validity import valid_mask
from tuner.search import refinement as stages
from tuner.search.grid import GRID_SHARE, grid_space
from tuner.search.refinement import MAX_CENTRES, centre_layouts, with_refinements
from tuner.search.variants import Variants, refined_values, variants_of
from tuner.space.enumeration import REFINED, enumerate_layouts
from tuner.space.table import find_row, layout_at
from tuner.sweep.budget import Clock, Ledger, Stop
from tuner.sweep.configuration import Budget, Sweep
from tuner.sweep.folder import SweepFolder
from tuner.sweep.loop import SweepLoop
from tuner.trial.contract import Outcome, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, TrialSource, read_trials
from tuner.trial.program import NOT_BUILT_IN

GRID = [knob for knob in KNOBS if knob not in REFINED]


def staged(cluster: Cluster = CLUSTER, **keys: Any) -> Sweep:
    return sweep_of(cluster, knobs=None, **keys)


@cache
def given_sweep(name: str) -> Sweep:
    """A default search of a built-in model."""
    model, cluster, seq_length, batch, precision = {
        "tiny-gpt": ("tiny-gpt", "cpu-4", 128, 8, "fp32"),
        "tiny-moe": ("tiny-moe", "cpu-4", 128, 8, "fp32"),
        "qwen3-30b-a3b": ("qwen3-30b-a3b", "dgx-h100", 4096, 512, "bf16"),
    }[name]
    choice = {"model": model, "seq_length": seq_length, "global_batch_size": batch, "precision": precision}
    return staged(load_cluster(cluster), workload=choice)


@cache
def given_table(name: str) -> pd.DataFrame:
    return table_of(given_sweep(name))


def keys_of(table: pd.DataFrame) -> set[tuple[Any, ...]]:
    return set(table[list(KNOBS)].itertuples(index=False, name=None))


def key_of(layout: Layout) -> tuple[Any, ...]:
    return tuple(getattr(layout, knob) for knob in KNOBS)


def whole(layout: Layout, sweep: Sweep) -> Variants:
    """Variants a layout, however many combinations there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "MOST_PRODUCTS", 10**9)
        return variants_of(layout, sweep.problem)


@settings(max_examples=20)
@given(data=st.data(), name=st.sampled_from(["tiny-gpt", "tiny-moe"]))
def test_around_a_layout_lies_every_valid_one_of_its_grid_and_not_itself(
    data: st.DataObject, name: str
) -> None:
    sweep, table = given_sweep(name), given_table(name)
    layout = layout_at(table, data.draw(st.integers(0, len(table) - 1)))
    found = whole(layout, sweep)
    domain = refined_values(layout, sweep.workload, sweep.cluster, sweep.refined)
    fixed = {knob: getattr(layout, knob) for knob in KNOBS if knob not in domain}
    every = enumerate_layouts(sweep.workload, sweep.cluster, domain, fixed).table
    assert found.changes is None
    assert len(keys_of(found.table)) == len(found.table) > 0
    assert keys_of(found.table) == keys_of(every) - {key_of(layout)}
    for knob in GRID:
        assert set(found.table[knob]) == {getattr(layout, knob)}


@settings(max_examples=10)
@given(data=st.data())
def test_where_the_combinations_are_too_many_only_few_choices_change_at_once(data: st.DataObject) -> None:
    sweep, table = given_sweep("tiny-moe"), given_table("tiny-moe")
    layout = layout_at(table, data.draw(st.integers(0, len(table) - 1)))
    every = whole(layout, sweep).table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "MOST_PRODUCTS", 1)
        patch.setattr(stages, "MOST_CHANGES", 2)
        few = variants_of(layout, sweep.problem)
    codes = codes_of(pd.concat([pd.DataFrame([dict(zip(KNOBS, key_of(layout), strict=True))]), every]))
    changes = (codes[1:] != codes[0]).sum(axis=1)
    assert few.changes == 2
    assert keys_of(few.table) == keys_of(every[changes <= 2])


def test_on_many_gpus_the_second_stage_stays_small() -> None:
    sweep, table = given_sweep("qwen3-30b-a3b"), given_table("qwen3-30b-a3b")
    for row in range(0, len(table), len(table) // 20):
        assert len(variants_of(layout_at(table, row), sweep.problem).table) < 30_000


def test_the_table_grows_at_its_end_by_layouts_that_it_does_not_hold() -> None:
    sweep, table = given_sweep("tiny-gpt"), given_table("tiny-gpt")
    found = [layout_at(table, row) for row in (0, 1, 2)]
    grown = with_refinements(table, found, sweep.problem)
    assert len(keys_of(grown)) == len(grown) > len(table)
    pd.testing.assert_frame_equal(grown.head(len(table)), table, check_categorical=False)
    assert keys_of(grown) == keys_of(table).union(
        *(keys_of(variants_of(one, sweep.problem).table) for one in found)
    )
    assert with_refinements(table, [], sweep.problem) is table
    assert with_refinements(table, found, replace(sweep, refined=()).problem) is table


def test_what_is_predicted_not_to_fit_is_left_out() -> None:
    sweep = given_sweep("tiny-gpt")
    small = replace(sweep, cluster=replace(sweep.cluster, gpu=replace(sweep.cluster.gpu, memory_gib=0.02)))
    table, found = given_table("tiny-gpt"), [layout_at(given_table("tiny-gpt"), 0)]
    every = with_refinements(table, found, small.problem)
    assert len(table) <= len(with_refinements(table, found, small.problem, least_fit=0.01)) < len(every)


def test_only_a_sweep_that_names_no_knobs_has_a_second_stage_and_what_is_fixed_stays() -> None:
    assert sweep_of().refined == ()
    sweep = staged(fixed={"overlap_grad_reduce": False, "overlap_param_gather": False})
    assert set(REFINED) - set(sweep.refined) == {
        "overlap_grad_reduce",
        "overlap_param_gather",
        *NOT_BUILT_IN,
    }
    layout = Layout(tp=2, sp=True)
    assert not set(variants_of(layout, sweep.problem).table["overlap_grad_reduce"]) - {False}


def test_which_layouts_the_stage_lies_around_is_what_the_last_trials_say() -> None:
    none, some = TrialSource(source="sampler"), TrialSource(source="sampler", around=(2, 0))
    assert refinement_centres([none, none]) == ()
    assert refinement_centres([none, some, none]) == (2, 0)
    assert centre_layouts((2, 0), [Layout(tp=1), Layout(tp=2), Layout(tp=4)]) == [Layout(tp=4), Layout(tp=1)]
    with pytest.raises(InputError, match=r"around trial 7, but there are 1 trials"):
        centre_layouts((7,), [Layout()])


def test_the_first_stage_has_the_baselines_details_wherever_they_are_valid() -> None:
    details = {"tp_comm_overlap": True, "expandable_segments": True, "overlap_grad_reduce": False}
    sweep = staged(baseline={"tp": 2, "sp": True, **details})
    plain, table = grid_space(staged().problem).table, grid_space(sweep.problem).table
    assert len(table) == len(plain)
    assert valid_mask(table, sweep.workload, sweep.cluster).all()
    # Only with sequence parallelism do tensor-parallel messages overlap.
    assert (table["tp_comm_overlap"] == table["sp"]).all()
    assert table["sp"].nunique() == 2
    assert table["expandable_segments"].all()
    # What the search sets itself, it keeps.
    assert table["overlap_grad_reduce"].all()
    same = [knob for knob in KNOBS if knob not in details]
    pd.testing.assert_frame_equal(table[same], plain[same])
    assert list(table.dtypes) == list(plain.dtypes)
    one_stage = sweep_of(baseline={"tp": 2, "sp": True, "tp_comm_overlap": True})
    assert not grid_space(one_stage.problem).table["tp_comm_overlap"].any()


def test_a_stated_text_is_carried_too() -> None:
    choice = {"model": "llama3-8b", "seq_length": 8192, "global_batch_size": 128}
    baseline = {"cp": 2, "cp_comm_type": "all_gather"}
    table = grid_space(staged(load_cluster("dgx-h100"), workload=choice, baseline=baseline).problem).table
    assert set(table["cp_comm_type"][table["cp"] > 1]) == {"all_gather"}
    assert set(table["cp_comm_type"][table["cp"] == 1]) == {"p2p"}


TRIALS = 12
FIRST = 8
"""60% of 12, rounded up."""


def better_in_second(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """A machine on which gathering parameters ahead slows every step by a quarter: only the second stage can see it."""
    return slowed(result, 1.25 if spec.layout.overlap_param_gather else 1.0)


def as_predicted(spec: TrialSpec, result: TrialResult) -> TrialResult:
    """A machine that the predictor knows, to a percent."""
    row = pd.DataFrame([dict(zip(KNOBS, key_of(spec.layout), strict=True))])
    predicted = predicted_ms(row, spec.workload, spec.cluster, "transformer_engine")[0]
    return slowed(result, predicted / step_time_ms(spec.layout) * (1 + 0.002 * (spec.number * 7 % 11 - 5)))


def launcher(**keys: Any) -> ReplayLauncher:
    return ReplayLauncher(change=better_in_second, **keys)


def night(**keys: Any) -> Sweep:
    return staged(**{"budget": {"trials": TRIALS}, **keys})


def run(loop: SweepLoop) -> Stop:
    return loop.run(threading.Event())


def story(results: Path) -> list[FinishedTrial]:
    return read_trials(results)


def second(rows: Sequence[FinishedTrial]) -> list[int]:
    return [row.number for row in rows if row.around]


def test_the_grid_comes_first_then_the_rest_around_the_best_few(results: Path) -> None:
    watching, sweep = Watching(), night()
    loop = loop_of(results, launcher(), sweep, observer=watching)
    assert run(loop) is Stop.TRIALS
    assert FIRST - 1 < GRID_SHARE * TRIALS <= FIRST
    assert second(loop.rows) == list(range(FIRST, TRIALS))
    (numbers,) = {row.around for row in loop.rows[FIRST:]}
    assert len(numbers) == MAX_CENTRES
    fastest: dict[tuple[Any, ...], int] = {}
    for row in sorted(loop.rows[:FIRST], key=lambda row: step_time_ms(row.layout)):
        fastest.setdefault(tuple(getattr(row.layout, knob) for knob in GRID), row.number)
    assert set(numbers) == set(list(fastest.values())[:MAX_CENTRES])
    table = table_of(sweep)
    assert all(find_row(table, row.layout) is not None for row in loop.rows[:FIRST])
    grown = with_refinements(table, [loop.rows[number].layout for number in numbers], sweep.problem)
    assert all(find_row(grown, row.layout) is not None for row in loop.rows)
    assert any(find_row(table, row.layout) is None for row in loop.rows[FIRST:])
    assert len({row.layout for row in loop.rows}) == TRIALS
    assert [progress.stage for progress in watching.progress] == [1] * 2 * FIRST + [2] * 2 * (TRIALS - FIRST)
    known = [progress.certainty.searched for progress in watching.progress if progress.certainty]
    assert sorted(set(known)) == ["both stages", "the first stage"]
    assert known == sorted(known, reverse=True)
    names = ", ".join(f"t{number:04d}" for number in numbers)
    assert any(
        f"From t{FIRST:04d} on a second stage" in told and names in told for told in verdict(loop.rows)
    )


def test_the_second_stage_finds_what_the_first_does_not_hold(results: Path) -> None:
    loop = run_to_end(results, launcher(), night(budget={"trials": 30}))
    winner = best_trial(loop.rows)
    assert winner is not None
    assert not winner.layout.overlap_param_gather
    assert winner.around


@pytest.fixture(scope="module")
def uninterrupted(in_memory: Path) -> list[FinishedTrial]:
    results = in_memory / "staged"
    run_to_end(results, launcher(), night())
    return story(results)


@pytest.mark.parametrize("number", [FIRST - 1, FIRST, FIRST + 2])
def test_killed_in_either_stage_the_sweep_goes_on_as_if_it_never_was(
    results: Path, number: int, uninterrupted: list[FinishedTrial]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, launcher(script={number: [KilledError]}), night()))
    run_to_end(results, launcher(), night())
    assert story(results) == uninterrupted


@pytest.mark.parametrize("number", [FIRST])
def test_killed_before_a_trials_spec_is_written_it_goes_on_too(
    results: Path, number: int, uninterrupted: list[FinishedTrial]
) -> None:
    with pytest.raises(KilledError):
        run(loop_of(results, launcher(script={number: [KilledError]}), night()))
    SweepFolder(results).trial(number).spec.unlink()
    run_to_end(results, launcher(), night())
    assert story(results) == uninterrupted


def test_a_deleted_study_is_rebuilt_over_both_stages(
    results: Path, uninterrupted: list[FinishedTrial]
) -> None:
    run_to_end(results, launcher(), night(budget={"trials": TRIALS}))
    SweepFolder(results).study.unlink()
    loop = run_to_end(results, launcher(), night(budget={"trials": TRIALS + 3}))
    assert loop.rows[:TRIALS] == uninterrupted
    assert {row.around for row in loop.rows[FIRST:]} == {uninterrupted[-1].around}
    assert len(loop.rows) == TRIALS + 3


def test_a_first_stage_with_nothing_left_leaves_its_budget_to_the_second(results: Path) -> None:
    fixed = {"tp": 2, "pp": 1, "cp": 1, "sp": True, "micro_batch_size": 2}
    sweep = night(fixed=fixed, budget={"trials": 30})
    first = len(table_of(sweep))
    assert first < 10
    loop = run_to_end(results, launcher(), sweep)
    assert second(loop.rows)[0] == first
    assert all(getattr(row.layout, knob) == value for row in loop.rows for knob, value in fixed.items())


def test_a_first_stage_that_converges_leaves_its_budget_to_the_second(results: Path) -> None:
    sweep = night(budget={"trials": 60, "min_gain": 0.1, "confidence": 0.9})
    loop = loop_of(results, ReplayLauncher(change=as_predicted), sweep)
    assert run(loop) is Stop.CONVERGED
    began = second(loop.rows)
    assert 5 <= began[0] < GRID_SHARE * 60
    assert began[-1] < 59
    certainty = loop.progress().certainty
    assert certainty is not None
    assert "best of both stages with probability 90%" in certainty.sentence(0.9)
    again = loop_of(results, ReplayLauncher(change=as_predicted), sweep)
    assert run(again) is Stop.CONVERGED
    assert again.rows == loop.rows


def test_where_nothing_is_measured_there_is_nothing_to_refine(results: Path) -> None:
    sweep = night(fixed={"tp": 2, "cp": 1}, budget={"trials": 12})
    loop = loop_of(results, ReplayLauncher(limit_gib=0.1), sweep)
    assert run(loop) in (Stop.EXHAUSTED, Stop.TRIALS)
    assert second(loop.rows) == []
    assert {row.result.outcome for row in loop.rows} == {Outcome.OOM}


def test_finals_come_behind_both_stages(results: Path) -> None:
    budget = {"trials": 20, "finalists": 2, "final_runs": 2, "canary_every": 4}
    loop = run_to_end(results, launcher(), night(budget=budget))
    order = [row.source for row in loop.rows]
    assert order[-6:] == ["final"] * 6
    assert "final" not in order[:-6]
    began = second(loop.rows)
    assert began == list(range(began[0], 20))
    assert began[0] == 9, "60% of the 14 trials that the search may take"
    loop = run_to_end(results, launcher(), night(budget={**budget, "trials": 24}))
    assert {row.around for row in loop.rows[began[0] :]} == {loop.rows[-1].around}


def test_the_evidence_of_a_sweep_holds_what_its_second_stage_could_try(
    in_memory: Path, uninterrupted: list[FinishedTrial]
) -> None:
    evidence = gather(night(), uninterrupted)
    sweep = night()
    found = [uninterrupted[number].layout for number in uninterrupted[-1].around]
    assert keys_of(evidence.table) >= keys_of(with_refinements(table_of(sweep), found, sweep.problem))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_every_sampler_goes_on_over_the_grown_table(results: Path, sampler: str) -> None:
    loop = run_to_end(results, launcher(), night(sampler=sampler))
    assert second(loop.rows) == list(range(FIRST, TRIALS))
    assert len({row.layout for row in loop.rows}) == TRIALS


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
def test_the_first_stage_ends_with_its_share_of_whatever_the_search_may_use(
    budget: Budget, deadline_s: float | None
) -> None:
    """20 trials of the search, of 15 s each."""

    def ledger(trials: int) -> Ledger:
        rows = tuple(completed_row(number, 100.0) for number in range(trials))
        clock = deadline_s and Clock(began_s=0.0, now_s=15.0 * trials, deadline_s=deadline_s)
        return Ledger(budget=budget, world_size=8, rows=rows, lost_s=0.0, clock=clock or None)

    assert ledger(11).search_is_over(0.6) is None
    assert ledger(12).search_is_over(0.6) is not None
    assert ledger(19).search_is_over() is None
    assert ledger(20).search_is_over() is not None
