"""A deadline is read once, lies in the future, and holds until another one is given."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.replay import TRIAL_S, ReplayLauncher, loop_of, run_to_end, sweep_of
from tuner.errors import InputError
from tuner.files import write_json, write_text
from tuner.sweep.budget import Stop
from tuner.sweep.deadline import KeptDeadline, chosen_deadline, next_day
from tuner.sweep.folder import SweepFolder
from tuner.trial.contract import Outcome, TrialResult, TrialSpec

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 3, 1, 22, 30, tzinfo=BERLIN)
NOW_S = NOW.timestamp()
KEPT = KeptDeadline(asked="07:00", at="2026-03-02T07:00:00+01:00")


class Clock:
    """A clock that each trial puts forward."""

    now_s = NOW_S

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s

    def trial(self, spec: TrialSpec, result: TrialResult) -> TrialResult:
        self.now_s += TRIAL_S
        return result


def asked(text: str, now: datetime = NOW) -> datetime:
    """The instant that a text stands for in Berlin, if no deadline was kept."""
    deadline = chosen_deadline(text, None, now, BERLIN)
    assert deadline is not None
    assert deadline.instant > now
    return deadline.instant


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("07:00", "2026-03-02T07:00+01:00"),
        ("23:15", "2026-03-01T23:15+01:00"),
        ("22:30", "2026-03-02T22:30+01:00"),
        ("2026-03-01T22:31", "2026-03-01T22:31+01:00"),
        ("2026-03-03 06:00", "2026-03-03T06:00+01:00"),
        ("2026-07-01", "2026-07-01T00:00+02:00"),
        ("2026-03-02T07:00+05:30", "2026-03-02T02:30+01:00"),
        ("2026-03-02T07:00Z", "2026-03-02T08:00+01:00"),
    ],
)
def test_a_deadline_is_the_next_time_of_day_or_a_date_and_time(text: str, wanted: str) -> None:
    assert asked(text).isoformat(timespec="minutes") == wanted


@pytest.mark.parametrize(
    ("now", "text", "wanted"),
    [
        # On 2026-10-25 the hour from 02:00 to 03:00 occurs twice in Berlin: first at +02:00, then at +01:00.
        ("2026-10-25T01:50+02:00", "02:30", "2026-10-25T02:30+02:00"),
        ("2026-10-25T02:40+02:00", "02:30", "2026-10-25T02:30+01:00"),
        ("2026-10-25T02:40+02:00", "2026-10-25T02:30", "2026-10-25T02:30+01:00"),
        ("2026-10-25T02:20+01:00", "02:30", "2026-10-25T02:30+01:00"),
        ("2026-10-25T02:40+01:00", "02:30", "2026-10-26T02:30+01:00"),
        # On 2026-03-29 the hour from 02:00 to 03:00 does not occur.
        ("2026-03-29T01:50+01:00", "02:30", "2026-03-29T03:30+02:00"),
        ("2026-03-29T01:50+01:00", "2026-03-29T02:30", "2026-03-29T03:30+02:00"),
        ("2026-03-29T03:10+02:00", "02:30", "2026-03-29T03:30+02:00"),
        ("2026-03-29T03:40+02:00", "02:30", "2026-03-30T02:30+02:00"),
    ],
)
def test_a_deadline_in_an_hour_that_occurs_twice_or_never_lies_in_the_future(
    now: str, text: str, wanted: str
) -> None:
    assert asked(text, datetime.fromisoformat(now)).isoformat(timespec="minutes") == wanted


@given(minute=st.integers(0, 2 * 366 * 24 * 60), hour=st.integers(0, 23), past=st.integers(0, 59))
@example(minute=428580, hour=2, past=30)
def test_a_time_of_day_lies_at_most_25_hours_ahead(minute: int, hour: int, past: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)
    assert asked(f"{hour:02}:{past:02}", now) - now <= timedelta(hours=25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "is neither a time of day"),
        ("24:00", "is neither"),
        ("0001-01-01", "is neither|has passed"),
        ("2026-03-01T22:30", "has passed, it is 2026-03-01T22:30"),
    ],
)
def test_a_deadline_that_cannot_be_met_or_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--deadline {text}: ({message})"):
        chosen_deadline(text, None, NOW, BERLIN)


def test_the_kept_deadline_holds_for_the_same_text_and_without_one() -> None:
    later = datetime(2026, 3, 2, 7, 0, 5, tzinfo=BERLIN)
    assert KEPT.has_passed(later)
    assert chosen_deadline("07:00", KEPT, later, BERLIN) == KEPT, (
        "the same command does not begin another night"
    )
    assert chosen_deadline(None, KEPT, later, BERLIN) == KEPT
    assert chosen_deadline(None, None, later, BERLIN) is None


def test_another_deadline_replaces_the_kept_one() -> None:
    later = datetime(2026, 3, 2, 7, 0, 5, tzinfo=BERLIN)
    text = next_day(KEPT, later, BERLIN)
    assert text == "2026-03-03T07:00"
    another = chosen_deadline(text, KEPT, later, BERLIN)
    assert another is not None and another.at == "2026-03-03T07:00:00+01:00"


def test_a_results_folder_keeps_its_deadline_and_one_from_before_has_none(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert folder.read_deadline() is None
    write_json(folder.deadline, KEPT)
    assert folder.read_deadline() == KEPT
    assert str(KEPT) == "2026-03-02 07:00+01:00"


@pytest.mark.parametrize("at", ["2026-03-02T07:00:00", "soon", ""])
def test_a_damaged_deadline_is_refused(tmp_path: Path, at: str) -> None:
    folder = SweepFolder(tmp_path)
    write_text(folder.deadline, f'{{"asked": "07:00", "at": "{at}"}}')
    with pytest.raises(InputError, match=r"deadline\.json"):
        folder.read_deadline()


@pytest.mark.parametrize("late_s", [0.5, 5.0, 86400.0])
def test_a_sweep_that_is_resumed_after_its_deadline_ends_at_once(results: Path, late_s: float) -> None:
    sweep, launcher = sweep_of(budget={"trials": 9, "finalists": 1, "final_runs": 2}), ReplayLauncher()
    run_to_end(results, ReplayLauncher(stop_at=4), sweep)
    loop = loop_of(results, launcher, sweep, deadline_s=NOW_S - late_s, clock=Clock())
    assert loop.run() is Stop.DEADLINE
    assert launcher.launched == []


def test_a_second_attempt_does_not_begin_after_the_deadline(results: Path) -> None:
    clock = Clock()
    launcher = ReplayLauncher(script={0: [Outcome.HANG]}, change=clock.trial)
    loop = loop_of(results, launcher, deadline_s=NOW_S + TRIAL_S / 2, clock=clock)
    assert loop.run() is Stop.DEADLINE
    assert launcher.numbers == [0]
    again = loop_of(results, launcher, deadline_s=NOW_S + TRIAL_S / 2, clock=clock)
    assert len(again.controller.state.waiting) == 1
    assert again.run() is Stop.DEADLINE
    assert launcher.numbers == [0]
