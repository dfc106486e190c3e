"""What a user reads while a sweep runs, and at its end."""

from dataclasses import replace

import numpy as np
import pytest

from tests.trials import completed_row
from tuner.cli.progress import outcome_line, standing
from tuner.cli.session import end_sentence
from tuner.search.stopping import Certainty
from tuner.sweep.budget import Stop
from tuner.sweep.progress import Progress, SearchPart

KNOWN = Certainty(np.array([0.0] * 93 + [0.02] * 3 + [0.2] * 4), measured=9)


def progress(certainty: Certainty | None, part: SearchPart | None = None) -> Progress:
    return Progress(
        finished=3,
        budget=10,
        used_s=180.0,
        left_s=None,
        best=completed_row(2, 100.0),
        pruned=0,
        certainty=certainty,
        part=part,
    )


def test_the_standing_tells_how_sure_the_best_is_where_that_is_known() -> None:
    assert "| 96% sure to be within 5% of the best |" in standing(progress(KNOWN))
    assert "sure" not in standing(progress(None))


def test_in_the_grid_the_standing_claims_no_more_than_of_the_grid() -> None:
    told = standing(progress(replace(KNOWN, searched="the grid"), part="grid"))
    assert told.startswith("3/10 trials | searching the grid |")
    assert "| 96% sure to be within 5% of the best of the grid |" in told
    assert "grid" not in standing(progress(KNOWN))


def test_a_trial_of_the_refinement_says_so() -> None:
    row = completed_row(4, 100.0)
    assert outcome_line(row, 0).startswith("trial 4 [sampler] ")
    assert outcome_line(replace(row, around=(1,)), 0).startswith("trial 4 [sampler, refinement] ")


@pytest.mark.parametrize("reason", list(Stop))
def test_however_it_ends_the_end_says_why_and_how_near_the_best_is(reason: Stop) -> None:
    told = end_sentence(reason, KNOWN, 0.95)
    assert reason.value in told
    assert "The best is within 2.0% of the best of the space with probability 95%" in told
    assert end_sentence(reason, None, 0.95).endswith(f"{reason.value}.")
