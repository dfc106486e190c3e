"""Hold the rules against Megatron on random layouts: `python -m tests.oracle --draws 2000 --seed 7`.

The JSON on stdout lists every disagreement, how Megatron took the draws, and how often a rule was broken
alone.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from tests.oracle.draws import Draw, directed, draws
from tests.oracle.megatron import Verdict, judge, prepare
from tuner.core.layout import DEFAULTS
from tuner.rules.rule import Violation
from tuner.rules.validity import broken_rules

PROCESSES = 2


def disagreement(verdict: Verdict, broken: tuple[Violation, ...]) -> str:
    """Say how Megatron and the rules disagree; empty if they do not.

    Of a layout in another than its canonical form the rules claim only that they refuse it.
    """
    kinds = {violation.kind for violation in broken}
    refused = bool(kinds & {"megatron", "program"})
    if verdict.accepted and refused and "canonical" not in kinds:
        return "Megatron takes what a rule says it refuses"
    if not verdict.accepted and not refused:
        return "Megatron refuses what no rule says it refuses"
    return ""


def report(draw: Draw, verdict: Verdict, broken: tuple[Violation, ...], how: str) -> dict[str, Any]:
    """All that is needed to see and repeat a disagreement."""
    layout = {knob: value for knob, value in asdict(draw.layout).items() if value != DEFAULTS[knob]}
    return {
        "how": how,
        "model": draw.workload.model.name,
        "precision": draw.workload.precision,
        "seq_length": draw.workload.seq_length,
        "global_batch_size": draw.workload.global_batch_size,
        "world_size": draw.cluster.world_size,
        "layout": layout,
        "verdict": asdict(verdict),
        "broken": [violation.rule for violation in broken],
    }


def ask(draw: Draw) -> tuple[Draw, Verdict, tuple[Violation, ...]]:
    """Ask Megatron and the rules."""
    verdict = judge(draw.workload, draw.layout, draw.cluster.world_size)
    return draw, verdict, broken_rules(draw.layout, draw.workload, draw.cluster)


def main() -> None:
    """Judge one case a rule and the random draws."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, alone, counts = [], Counter[str](), Counter[str]()
    wanted = chain(directed(), islice(draws(options.seed), options.draws))
    # Megatron's hooks keep a model alive for good, so a process judges a few only; a fork imports nothing.
    with get_context("fork").Pool(PROCESSES, initializer=prepare, maxtasksperchild=100) as pool:
        for draw, verdict, broken in pool.imap(ask, wanted):
            counts["accepted" if verdict.accepted else f"refused: {verdict.stage}"] += 1
            counts["valid"] += not broken
            if len(broken) == 1:
                alone[broken[0].rule] += 1
            if how := disagreement(verdict, broken):
                found.append(report(draw, verdict, broken, how))
    json.dump({"disagreements": found, "counts": counts, "broken_alone": alone}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
