"""What a sweep found is read from its folders, ranked by measurement, and shown without a gap."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.trials import completed_row, failed_row, write_trial
from tuner.analysis.figures import best_trial, figures, tied_trials
from tuner.analysis.verdict import verdict
from tuner.core.layout import KNOBS, Layout
from tuner.errors import InputError
from tuner.report.page import html_page
from tuner.report.summary import summary, time_shares
from tuner.report.table import trial_table
from tuner.report.terminal import terminal_table
from tuner.trial.contract import Outcome
from tuner.trial.finished import FinishedTrial, read_trials, trial_folder

NIGHT = [
    completed_row(0, 100.0, layout=Layout(tp=8), source="baseline"),
    failed_row(1),
    completed_row(2, 80.0, layout=Layout(tp=2, sp=True), source="seed"),
    completed_row(3, 81.5, layout=Layout(tp=4)),
    failed_row(4, Outcome.TIMEOUT, "over 30 min [bold]see the log[/bold] | a <b>tag</b>"),
    failed_row(5),
]


def test_trials_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    for row in reversed(NIGHT):
        write_trial(tmp_path, row)
    assert read_trials(tmp_path) == NIGHT


def test_a_folder_without_a_result_is_unfinished(tmp_path: Path) -> None:
    write_trial(tmp_path, NIGHT[0])
    write_trial(tmp_path, NIGHT[1]).result.unlink()
    assert [row.number for row in read_trials(tmp_path)] == [0]


def test_a_sweep_that_has_not_begun_has_no_trials(tmp_path: Path) -> None:
    assert read_trials(tmp_path) == []


@pytest.mark.parametrize("name", ["spec.json", "source.json", "result.json"])
@pytest.mark.parametrize("damage", ["torn", "foreign", "binary"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write_trial(tmp_path, NIGHT[0]).path / name
    if damage == "torn":
        path.write_text(path.read_text()[:-20])
    elif damage == "foreign":
        path.write_text('{"unheard_of": 1}')
    else:
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_trials(tmp_path)


def test_a_copied_folder_is_refused(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, NIGHT[0])
    folder.path.rename(trial_folder(tmp_path, 7).path)
    with pytest.raises(InputError, match=r"'number' is 0, but the folder is t0007"):
        read_trials(tmp_path)


def test_folders_beyond_four_digits_keep_their_order(tmp_path: Path) -> None:
    for number in (10_000, 9_999, 2):
        write_trial(tmp_path, replace(NIGHT[0], number=number))
    assert [row.number for row in read_trials(tmp_path)] == [2, 9_999, 10_000]


def test_the_best_trial_is_the_fastest_completed_one() -> None:
    assert best_trial(NIGHT) is NIGHT[2]
    assert best_trial([NIGHT[1], NIGHT[4]]) is None
    assert best_trial([]) is None


def test_trials_tie_where_their_intervals_overlap() -> None:
    # 79..81 against 80.5..82.5 overlap; 99..101 lies apart.
    assert [row.number for row in tied_trials(NIGHT)] == [2, 3]
    assert tied_trials([NIGHT[1]]) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(10, 1000), st.floats(0.01, 5)), min_size=1, max_size=8))
def test_no_tie_is_told_apart_by_its_intervals(times: list[tuple[float, float]]) -> None:
    rows = [
        completed_row(number, step, half_interval_ms=half, layout=Layout(micro_batch_size=number + 1))
        for number, (step, half) in enumerate(times)
    ]
    tied = tied_trials(rows)
    assert tied[0] == best_trial(rows)
    fastest = tied[0].result.metrics
    assert fastest is not None
    for row in rows:
        metrics = row.result.metrics
        assert metrics is not None
        apart = metrics.step_time_low_ms > fastest.step_time_high_ms
        assert (row in tied) is not apart


def test_figures_compare_with_the_fastest_other_layout_and_the_baseline() -> None:
    # The winner measured again is no rival of itself.
    again = completed_row(6, 80.2, layout=Layout(tp=2, sp=True))
    facts = figures([*NIGHT, again])
    assert facts is not None and facts.rival is not None and facts.baseline is not None
    assert (facts.trial, facts.rival.trial, facts.baseline.trial) == (2, 3, 0)
    assert facts.rival.is_tie
    assert not facts.baseline.is_tie
    assert facts.baseline.ratio == pytest.approx(100 / 80)
    assert facts.baseline.ratio_low == pytest.approx(99 / 81)
    assert facts.baseline.ratio_high == pytest.approx(101 / 79)


def test_figures_of_a_named_trial_are_its_own() -> None:
    facts = figures(NIGHT, number=3)
    assert facts is not None and facts.rival is not None
    assert (facts.trial, facts.rival.trial) == (3, 2)
    assert facts.rival.ratio < 1
    assert figures(NIGHT, number=1) is None


def test_the_table_holds_every_trial_knob_and_measurement() -> None:
    table = trial_table(NIGHT)
    assert table["number"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["outcome"].tolist() == ["completed", "oom", "completed", "completed", "timeout", "oom"]
    assert table["step_time_ms"].isna().tolist() == [False, True, False, False, True, True]
    assert table["tokens_per_s_per_gpu"].dropna().tolist() == pytest.approx(
        [2560.0, 3200.0, 2048 / 0.0815 / 8]
    )
    assert set(KNOBS) <= set(table.columns)
    assert [Layout(**{knob: row[knob] for knob in KNOBS}) for row in table.to_dict("records")] == [
        row.layout for row in NIGHT
    ]


def test_the_table_of_no_trials_has_its_columns() -> None:
    assert list(trial_table([]).columns) == list(trial_table(NIGHT).columns)


def _terminal(rows: list[FinishedTrial], width: int = 160) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(rows, "night [1]"))
    return capture.get()


def test_the_terminal_shows_the_fastest_first_and_why_others_failed() -> None:
    lines = _terminal(NIGHT).splitlines()
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
    text = _terminal(
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
    assert _terminal([]) == "night [1]\n"


def _sections(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_the_summary_answers_the_mornings_questions_in_order() -> None:
    text = summary(
        NIGHT, "night", "Finished: every layout was tried.", {"Export it": "megatune export night"}
    )
    assert text.startswith("# night\n\nFinished: every layout was tried.\n\n6 trials in 0.02 h")
    assert "3 completed, 2 oom, 1 timeout" in text
    assert _sections(text) == ["Best layout", "Failures by cause", "Next"]
    assert "| step time, ms | 80.0 | 100.0 |" in text
    assert "1.250x the throughput of the baseline" in text
    assert "tie within 4.4%" in text
    assert "model.tensor_model_parallel_size = 2\nmodel.sequence_parallel = True\n```" in text
    assert "| oom | 2 | t0001 tp2 pp1 mbs2: rank 3 ran out of memory |" in text
    assert "| timeout | 1 |" in text
    assert "Export it:\n\n```\nmegatune export night\n```" in text


def test_the_cells_of_the_summary_stay_in_their_table() -> None:
    line = next(line for line in summary(NIGHT, "night", "", {}).splitlines() if "timeout | 1" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 4


def test_a_summary_without_a_measurement_says_so() -> None:
    text = summary([NIGHT[1]], "night", "Stopped.", {})
    assert _sections(text) == ["No layout completed", "Failures by cause"]
    assert "none finished" in summary([], "night", "Stopped.", {})


def test_a_best_baseline_stands_alone_in_the_summary() -> None:
    text = summary([NIGHT[0]], "night", "Finished.", {})
    assert "|  | best |" in text
    assert "This is the baseline itself." in text


def test_the_page_is_self_contained_and_shows_every_trial() -> None:
    page = html_page(NIGHT, "night <1>", summary(NIGHT, "night", "Finished.", {}))
    assert "<title>night &lt;1&gt;</title>" in page
    assert page.count("Plotly.newPlot(") >= 2
    # plotly.js is there, once, and nothing is fetched.
    assert page.count("plotly.js v") == 1
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    table = page[page.index("<h2>Every trial</h2>") :]
    assert table.count("<tr>") == len(NIGHT)
    assert html.escape("a <b>tag</b>") in table
    assert "<b>tag</b>" not in page


def test_a_page_without_a_measurement_has_no_plot() -> None:
    page = html_page([NIGHT[1]], "night", "Stopped.")
    assert "Plotly" not in page
    assert "rank 3 ran out of memory" in page


FINALS = [
    completed_row(10, 82.0, layout=Layout(tp=2, sp=True), source="final"),
    completed_row(11, 80.0, layout=Layout(tp=4), source="final", peak_gib=8.0),
    completed_row(12, 100.0, layout=Layout(tp=8), source="final"),
    completed_row(13, 100.5, layout=Layout(tp=8), source="final"),
    completed_row(14, 80.5, layout=Layout(tp=4), source="final", peak_gib=8.0),
    completed_row(15, 81.0, layout=Layout(tp=2, sp=True), source="final"),
]


def test_finals_head_the_terminal_and_their_winner_is_the_best() -> None:
    rows = [*NIGHT, *FINALS]
    text = _terminal(rows)
    finals, search = text.split("Search")
    assert finals.index("t0011, t0014") < finals.index("t0010, t0015") < finals.index("t0012, t0013")
    assert "80.2" in finals
    assert "+24.9%" in finals
    assert "tie" in finals
    assert "t0011" not in search
    assert best_trial(rows) is FINALS[1]
    assert [row.layout for row in tied_trials(rows)] == [Layout(tp=4), Layout(tp=2, sp=True)]


def test_figures_of_finals_hold_all_their_runs() -> None:
    facts = figures([*NIGHT, *FINALS])
    assert facts is not None and facts.baseline is not None
    assert (facts.trial, facts.final_runs, len(facts.metrics.step_times_ms)) == (11, 2, 6)
    assert facts.baseline.ratio == pytest.approx(100.25 / 80.25, rel=1e-3)
    assert (
        "6 timed steps in 2 interleaved runs; the fastest other layout, t0015" in facts.certainty_sentence()
    )
    assert "(95% interval 1." in facts.gain_sentence()


def test_the_verdict_names_ties_and_their_memory() -> None:
    (told,) = verdict([*NIGHT, *FINALS])
    assert told.startswith("Tie within ")
    assert "the best, tp4 pp1 mbs1, from tp2 pp1 sp mbs1 (+1.6%, 10 GiB); of these it takes the least" in told


def test_the_verdict_says_what_rests_on_the_search_alone_who_is_out_and_what_was_disturbed() -> None:
    metrics = NIGHT[2].result.metrics
    assert metrics is not None
    other = replace(NIGHT[2], result=replace(NIGHT[2].result, metrics=replace(metrics, losses=(9.0,))))
    shared = replace(NIGHT[3], result=replace(NIGHT[3].result, suspicions=("shared", "throttled")))
    again = completed_row(6, 81.0, layout=Layout(pp=2), source="repeat")
    told = verdict([NIGHT[0], other, shared, again])
    assert told[0] == "By single measurements of the search: no finals ran."
    assert told[1].startswith(
        "Out: tp2 pp1 sp mbs1 trains differently: in step 1 of t0002 the loss is 9, the baseline's"
    )
    assert told[2] == "1 trials that the machine had disturbed were measured again."
    assert (
        told[3] == "Measured on a disturbed machine, so less sure: t0003 tp4 pp1 mbs1: shared (2 such lines)."
    )
    assert "(disturbed)" in _terminal([NIGHT[0], other, shared])
    assert "completed (out)" in _terminal([NIGHT[0], other, shared])


def test_outliers_are_told_beside_their_trial() -> None:
    metrics = NIGHT[2].result.metrics
    assert metrics is not None
    flagged = replace(NIGHT[2], result=replace(NIGHT[2].result, metrics=replace(metrics, outliers=(1,))))
    assert "completed, 1 outliers" in _terminal([flagged])


def test_the_share_of_the_night_that_measured_is_told() -> None:
    told = time_shares([NIGHT[0], NIGHT[1], NIGHT[2]], own_s=0.6, run_s=60.0)
    # 15 + 12 + 15 s, of them 8 + 8 + 8 of start-up and 3 + 3 of timed steps.
    assert told == (
        "Of 42 s of trials: 57% start-up, 5% build, 10% warm-up, 14% timed steps, 14% the rest. "
        "The tuner's own time between this run's trials: 0.6 s, 1.0%."
    )
    assert "own time" not in time_shares(NIGHT)
    assert time_shares([]) == "No trial took any time."
    assert told in summary(NIGHT, "night", "Finished.", {}, told)
