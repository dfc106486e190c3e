"""Every real message in the table is recognised, and every pattern is backed by a real message."""

import re

import pytest

from tests.failure_texts import FAILURE_TEXTS, FailureText
from tuner.trial import failure_texts
from tuner.trial.contract import Outcome
from tuner.trial.outcomes import outcome_of_failure


def summary(row: FailureText) -> str:
    return f"{row.outcome}: {row.text[:60]}"


@pytest.mark.parametrize("row", FAILURE_TEXTS, ids=summary)
def test_a_real_message_has_the_outcome_that_the_table_states(row: FailureText) -> None:
    assert outcome_of_failure(row.failure, "startup", 0)[0] is row.outcome


def test_every_message_names_its_source() -> None:
    assert [row.text for row in FAILURE_TEXTS if not row.source] == []
    assert len({row.text for row in FAILURE_TEXTS}) == len(FAILURE_TEXTS)


@pytest.mark.parametrize(
    ("pattern", "outcome"),
    [
        (failure_texts.BROKEN_MACHINE, Outcome.INFRASTRUCTURE),
        (failure_texts.OUT_OF_MEMORY, Outcome.OOM),
        (failure_texts.COMMUNICATION, Outcome.COMMUNICATION),
        (failure_texts.DEVICE, Outcome.INFRASTRUCTURE),
    ],
    ids=["broken machine", "out of memory", "communication", "device"],
)
def test_every_pattern_is_found_in_a_real_message_of_its_outcome(
    pattern: re.Pattern[str], outcome: Outcome
) -> None:
    texts = [row.printed for row in FAILURE_TEXTS if row.outcome is outcome]
    alternatives = pattern.pattern.removeprefix("(?:").removesuffix(")").split(")|(?:")
    assert len(alternatives) > 2
    unfounded = [part for part in alternatives if not any(re.search(part, text, re.I) for text in texts)]
    assert unfounded == []
