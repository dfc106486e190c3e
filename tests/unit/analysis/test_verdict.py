"""What a user is told to believe about the answer: ties, layouts that are out, disturbed measurements."""

from dataclasses import replace

from tests.trials import completed_row
from tests.unit.nights import FINALS, NIGHT
from tuner.analysis.verdict import verdict
from tuner.core.layout import Layout


def test_the_verdict_names_ties_and_their_memory() -> None:
    (sentence,) = verdict([*NIGHT, *FINALS])
    assert sentence.startswith("Tie within ")
    assert (
        "the best, tp4 pp1 mbs1, from tp2 pp1 sp mbs1 (+1.6%, 10 GiB); of these, tp4 pp1 mbs1 takes the least"
        in sentence
    )


def test_the_verdict_says_that_no_finals_ran_which_layouts_are_out_and_what_was_disturbed() -> None:
    metrics = NIGHT[2].result.metrics
    assert metrics is not None
    other = replace(NIGHT[2], result=replace(NIGHT[2].result, metrics=replace(metrics, losses=(9.0,))))
    shared = replace(NIGHT[3], result=replace(NIGHT[3].result, suspicions=("shared", "throttled")))
    again = completed_row(6, 81.0, layout=Layout(pp=2), source="repeat")
    sentences = verdict([NIGHT[0], other, shared, again])
    assert sentences[0] == "The ranking rests on single measurements of the search, because no finals ran."
    assert sentences[1].startswith(
        "Out: tp2 pp1 sp mbs1 trains differently: in step 1 of t0002 the loss is 9, the baseline's"
    )
    assert (
        sentences[2] == "1 trial was measured again, because the machine had disturbed the first measurement."
    )
    assert (
        sentences[3]
        == "The answer is less sure, because the machine was disturbed: t0003 tp4 pp1 mbs1: shared (2 such lines)."
    )
