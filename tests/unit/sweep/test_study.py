"""Optuna's study is a view: it holds exactly the trials it is given, or is written anew."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from tests.trials import metrics_of
from tuner.search.observation import STATES
from tuner.sweep.study import StudyTrial, open_study
from tuner.trial.contract import Outcome, TrialResult

SPACE: dict[str, BaseDistribution] = {
    "tp": CategoricalDistribution([1, 2, 4]),
    "sp": CategoricalDistribution([False, True]),
    "recompute_granularity": CategoricalDistribution(["full", "none"]),
}
PARAMS: dict[str, Any] = {"tp": 2, "sp": True, "recompute_granularity": "none"}


def _trial(outcome: Outcome | None, step_time_ms: float = 100.0) -> StudyTrial:
    metrics = metrics_of(step_time_ms) if outcome is Outcome.COMPLETED else None
    result = None if outcome is None else TrialResult(outcome=outcome, reason="why", metrics=metrics)
    return StudyTrial(params=PARAMS, result=result, source="seed", label="tp2 sp")


def _open(path: Path, *trials: StudyTrial, space: dict[str, BaseDistribution] = SPACE) -> optuna.Study:
    return open_study(path / "study.db", "night", space, trials)


def test_every_outcome_has_a_state_and_only_what_is_run_again_waits() -> None:
    assert set(STATES) == set(Outcome)
    waiting = {outcome for outcome, state in STATES.items() if state is TrialState.WAITING}
    assert waiting == {Outcome.INFRASTRUCTURE, Outcome.INTERRUPTED}
    assert [o for o, state in STATES.items() if state is TrialState.COMPLETE] == [Outcome.COMPLETED]


@pytest.mark.parametrize("outcome", [*Outcome, None])
def test_a_trial_is_kept_with_its_state_value_and_attributes(results: Path, outcome: Outcome | None) -> None:
    results.mkdir()
    _open(results, _trial(outcome))
    (trial,) = _open(results, _trial(outcome)).trials
    if outcome is None or STATES[outcome] is TrialState.WAITING:
        assert trial.state is TrialState.WAITING
        assert trial.system_attrs["fixed_params"] == PARAMS
        assert trial.user_attrs == {"source": "seed", "layout": "tp2 sp"}
    else:
        assert trial.state is STATES[outcome]
        assert trial.params == PARAMS
        assert trial.value == (100.0 if outcome is Outcome.COMPLETED else None)
        assert trial.user_attrs == {
            "source": "seed",
            "layout": "tp2 sp",
            "outcome": outcome.value,
            "reason": "why",
        }


def test_a_waiting_trial_is_the_next_one_asked_for_with_its_number_and_layout(results: Path) -> None:
    results.mkdir()
    study = _open(results, _trial(Outcome.COMPLETED), _trial(None), _trial(Outcome.OOM))
    trial = study.ask(SPACE)
    assert (trial.number, trial.params) == (1, PARAMS)
    study.tell(trial, 90.0)
    assert study.ask(SPACE).number == 3
    assert study.best_trial.number == 1


def test_a_study_is_opened_again_as_it_is_and_rebuilt_once_it_differs(results: Path) -> None:
    results.mkdir()
    _open(results, _trial(Outcome.COMPLETED)).set_user_attr("mark", "first")
    assert _open(results, _trial(Outcome.COMPLETED)).user_attrs == {"mark": "first"}
    for other in (
        [_trial(Outcome.COMPLETED, 99.0)],
        [],
        [_trial(Outcome.COMPLETED)] * 2,
        [_trial(Outcome.NAN)],
    ):
        study = _open(results, *other)
        assert study.user_attrs == {}
        assert len(study.trials) == len(other)
        study.set_user_attr("mark", "again")


def test_another_space_rebuilds_the_study_and_drops_what_no_longer_varies(results: Path) -> None:
    results.mkdir()
    _open(results, _trial(Outcome.COMPLETED))
    wider = {**SPACE, "tp": CategoricalDistribution([1, 2, 4, 8])}
    (trial,) = _open(results, _trial(Outcome.COMPLETED), space=wider).trials
    assert trial.distributions["tp"] == wider["tp"]
    (trial,) = _open(results, _trial(Outcome.COMPLETED), space={"tp": SPACE["tp"]}).trials
    assert trial.params == {"tp": 2}


def test_the_folder_may_have_spaces_quotes_and_signs(results: Path) -> None:
    folder = results / "a night: #1 [b] & 'é'"
    folder.mkdir(parents=True)
    _open(folder, _trial(Outcome.COMPLETED)).set_user_attr("mark", "first")
    assert (folder / "study.db").exists()
    assert _open(folder, _trial(Outcome.COMPLETED)).user_attrs == {"mark": "first"}
