"""The tables for the terminal: fastest first, with every figure whole and every failure explained."""

import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.trials import completed_row
from tests.unit.nights import FINALS, NIGHT
from tuner.core.layout import Layout
from tuner.report.terminal import MOST_ROWS, terminal_table
from tuner.trial.finished import FinishedTrial


def terminal(rows: list[FinishedTrial], width: int = 160) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(rows, "night [1]"))
    return capture.get()


def test_the_terminal_shows_the_fastest_first_and_why_others_failed() -> None:
    lines = terminal(NIGHT).splitlines()
    assert lines[0] == "night [1]"
    by_trial = {match.group(): line for line in lines if (match := re.search(r"t\d{4}", line))}
    assert list(by_trial) == ["t0002", "t0003", "t0000", "t0001", "t0004", "t0005"]
    for fact in ("tp2 pp1 sp mbs1", "80.0", "±1.2%", "3,200", "best"):
        assert fact in by_trial["t0002"]
    assert "+1.9%" in by_trial["t0003"]
    assert "+25.0%" in by_trial["t0000"]
    assert "over 30 min [bold]see the log[/bold]" in by_trial["t0004"]
    assert [line.split()[0] for line in lines if line.split()[0:1] in (["seed"], ["baseline"])] == [
        "seed",
        "baseline",
    ]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_figure_is_cut_on_a_terminal_of_80_columns(width: int) -> None:
    knobs = Layout(
        tp=2, pp=16, vpp=4, ep=64, sp=True, recompute_granularity="selective", recompute_modules="moe_act"
    )
    text = terminal(
        [completed_row(0, 12_345.6, layout=knobs, source="baseline", peak_gib=132.5), NIGHT[4]], width
    )
    for fact in ("t0000", "baseline", "12,345.6", "±0.0%", "21", "132", "best", "timeout"):
        assert fact in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_only_the_best_trial_is_highlighted() -> None:
    title, ranked, failed = terminal_table(NIGHT, "night").renderables
    assert isinstance(title, Text) and isinstance(ranked, Table) and isinstance(failed, Table)
    assert [str(row.style) for row in ranked.rows] == ["bold green", "", ""]
    assert [str(row.style) for row in failed.rows] == ["red", "red", "red"]


def test_a_sweep_without_trials_prints_its_title_alone() -> None:
    assert terminal([]) == "night [1]\n"


def test_finals_head_the_terminal() -> None:
    text = terminal([*NIGHT, *FINALS])
    finals, search = text.split("Search")
    assert finals.index("t0011, t0014") < finals.index("t0010, t0015") < finals.index("t0012, t0013")
    assert "80.2" in finals
    assert "+24.9%" in finals
    assert "tie" in finals
    assert "t0011" not in search


def test_remarks_say_which_trials_were_disturbed_are_out_or_have_outliers() -> None:
    fast, other = NIGHT[2].result, NIGHT[3].result
    assert fast.metrics is not None
    out = replace(NIGHT[2], result=replace(fast, metrics=replace(fast.metrics, losses=(9.0,))))
    disturbed = replace(NIGHT[3], result=replace(other, suspicions=("shared", "throttled")))
    assert "(disturbed)" in terminal([NIGHT[0], out, disturbed])
    assert "completed (out)" in terminal([NIGHT[0], out, disturbed])
    noisy = replace(NIGHT[2], result=replace(fast, metrics=replace(fast.metrics, outliers=(1,))))
    assert "completed, 1 outliers" in terminal([noisy])


def test_of_many_trials_the_fastest_and_the_latest_failures_are_shown() -> None:
    measured = [completed_row(number, 100.0 + number) for number in range(MOST_ROWS + 5)]
    failed = [replace(NIGHT[4], number=1000 + number) for number in range(MOST_ROWS + 7)]
    text = terminal([*measured, *failed])
    assert len(re.findall(r"^ *t0\d{3}", text, re.MULTILINE)) == MOST_ROWS
    assert len(re.findall(r"^ *t1\d{3}", text, re.MULTILINE)) == MOST_ROWS
    assert "t0000" in text and f"t{MOST_ROWS:04d}" not in text
    assert "t1000" not in text and f"t{1000 + MOST_ROWS + 6:04d}" in text
    assert f"the fastest {MOST_ROWS} of {MOST_ROWS + 5} trials; all of them with --json or --html" in text
    assert f"the latest {MOST_ROWS} of {MOST_ROWS + 7} trials" in text
