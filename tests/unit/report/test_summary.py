"""The summary in Markdown answers the questions of the morning, also after a night without a measurement."""

import re

from tests.unit.nights import NIGHT
from tuner.report.summary import summary, time_shares


def sections(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_the_summary_answers_the_mornings_questions_in_order() -> None:
    text = summary(
        NIGHT, "night", "Finished: every layout was tried.", {"Export it": "megatune export night"}
    )
    assert text.startswith("# night\n\nFinished: every layout was tried.\n\n6 trials in 0.02 h")
    assert "3 completed, 2 oom, 1 timeout" in text
    assert sections(text) == ["Best layout", "Failures by cause", "Next"]
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
    assert sections(text) == ["No layout completed", "Failures by cause"]
    assert "none finished" in summary([], "night", "Stopped.", {})


def test_a_best_baseline_stands_alone_in_the_summary() -> None:
    text = summary([NIGHT[0]], "night", "Finished.", {})
    assert "|  | best |" in text
    assert "This is the baseline itself." in text


def test_the_share_of_the_night_that_measured_is_stated() -> None:
    sentence = time_shares([NIGHT[0], NIGHT[1], NIGHT[2]], own_s=0.6, run_s=60.0)
    # The trials take 15 + 12 + 15 s, of which 8 + 8 + 8 s are start-up and 3 + 3 s are timed steps.
    assert sentence == (
        "Of 42 s of trials: 57% start-up, 5% build, 10% warm-up, 14% timed steps, 14% the rest. "
        "The tuner's own time between this run's trials: 0.6 s, 1.0%."
    )
    assert "own time" not in time_shares(NIGHT)
    assert time_shares([]) == "No trial took any time."
    assert sentence in summary(NIGHT, "night", "Finished.", {}, sentence)
