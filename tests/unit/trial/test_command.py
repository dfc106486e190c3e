"""Commands of the user as programs of a trial, and the figures in their logs; the log lines have the real formats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.trial.program import MEGATRON_LM_PATTERNS, Command, fill, read_log

OLD_LINES = """
 iteration       10/     100 | samples: 80 | elapsed time per iteration (ms): 612.4 | learning rate: 1.5E-06 | \
global batch size:     8 | lm loss: 1.081024E+01 | loss scale: 1.0 | grad norm: 21.520 |
[Rank 0] (after 10 iterations) memory (MB) | allocated: 6144.5 | max allocated: 8192.0 | reserved: 9000.0 | \
max reserved: 9216.0
[Rank 4] (after 10 iterations) memory (MB) | allocated: 6144.5 | max allocated: 10240.0 | reserved: 10300.0 | \
max reserved: 11264.0
 iteration       11/     100 | samples: 88 | elapsed time per iteration (ms): 600.1 | learning rate: 1.5E-06 | \
global batch size:     8 | lm loss: 1.079000E+01 | loss scale: 1.0 | grad norm: nan |
"""
NEW_LINES = """
 [2026-08-22 10:00:01] iteration        3/       8 | samples:  384 | elapsed time per iteration (ms): 8123.9 | \
throughput per GPU (TFLOP/s/GPU): 702.1 | learning rate: 3.0E-07 | global batch size:   128 | lm loss: 1.196E+01 | \
loss scale: 1.0 | grad norm: 5.123 | number of skipped iterations:   0 | number of nan iterations:   0 |
[Rank 0] (after 2 iterations) memory (GB) | mem-allocated-gigabytes: 30.1 | mem-max-allocated-gigabytes: 53.687 | \
mem-max-reserved-gigabytes: 64.425
"""


def test_the_old_lines_of_megatron_lm_are_read() -> None:
    figures = read_log(OLD_LINES, MEGATRON_LM_PATTERNS)
    assert figures.step_time_ms == (612.4, 600.1)
    assert figures.loss == (10.81024, 10.79)
    assert figures.grad_norm[0] == 21.52 and figures.grad_norm[1] != figures.grad_norm[1]
    assert (figures.peak_allocated_gib, figures.peak_reserved_gib) == (10.0, 11.0)


def test_the_new_lines_of_megatron_lm_are_read() -> None:
    figures = read_log(NEW_LINES, MEGATRON_LM_PATTERNS)
    assert figures.step_time_ms == (8123.9,)
    assert figures.loss == (11.96,)
    assert figures.peak_allocated_gib == pytest.approx(50.0, abs=0.001)
    assert figures.peak_reserved_gib == pytest.approx(60.0, abs=0.001)


def test_the_name_of_a_number_states_its_unit_in_the_log() -> None:
    patterns = {"step_time_s": r"took ([\d.]+)s", "peak_allocated_gib": r"peak ([\d.]+)"}
    figures = read_log("took 1.5s\ntook 0.25s, peak 3\npeak 2", patterns)
    assert figures.step_time_ms == (1500.0, 250.0)
    assert figures.peak_allocated_gib == 3.0
    assert figures.peak_reserved_gib is None


def test_placeholders_are_filled_and_other_braces_stay() -> None:
    words = fill(
        ("run", "--tp={tp}", '--json={"a": 1}', "{megatron_lm}", "{spec}"),
        {"tp": "4", "spec": "/x y/spec.json"},
        {"megatron_lm": ("--tensor-model-parallel-size", "4")},
    )
    assert words == (
        "run",
        "--tp=4",
        '--json={"a": 1}',
        "--tensor-model-parallel-size",
        "4",
        "/x y/spec.json",
    )


@given(value=st.text())
def test_a_value_of_any_characters_stays_one_word(value: str) -> None:
    assert fill(("echo", "{folder}"), {"folder": value}, {}) == ("echo", value)


@pytest.mark.parametrize(
    ("command", "log", "message"),
    [
        ((), None, "command is empty"),
        (("run", "{pt}"), None, r"unknown placeholder \{pt\}"),
        (("run", "--x={bridge}"), None, "must stand alone"),
        (("run",), {"step_tim_ms": "(.*)"}, "unknown figure 'step_tim_ms' .did you mean 'step_time_ms'"),
        (("run",), {"step_time_ms": "("}, "is no regular expression"),
        (("run",), {"step_time_ms": r"\d+"}, "has 0 groups"),
        (("run",), {"loss": r"(\d+)"}, "finds no step time"),
        (("run",), {"step_time_s": r"(\d+)"}, "finds no peak memory"),
    ],
)
def test_a_command_that_cannot_be_used_is_refused_with_the_reason(
    command: tuple[str, ...], log: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Command(command=command, log=log)
