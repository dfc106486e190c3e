"""Hold the rules against Megatron on random layouts: `python -m tests.oracle --draws 2000 --seed 7`.

The JSON on stdout lists every disagreement, how many draws Megatron accepted and refused, and how many draws broke each
rule alone.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from tests.oracle.draws import OTHER_RELEASES, Draw, directed_draws, random_draws
from tests.oracle.megatron import Answer, judge, prepare
from tuner.core.layout import DEFAULTS
from tuner.rules.rule import Violation
from tuner.rules.validity import broken_rules

PROCESSES = 2


def disagreement(answer: Answer, violations: tuple[Violation, ...]) -> str:
    """Say how Megatron and the rules disagree; empty if they agree.

    A `canonical` rule only claims that another layout spells the same run, and an `arguments` rule that a training loop
    refuses the layout, so Megatron-Core may take or refuse what breaks one.
    """
    kinds = {violation.kind for violation in violations}
    refused = bool(kinds & {"megatron", "program"})
    if answer.accepted and refused and "canonical" not in kinds:
        return "Megatron takes what a rule says it refuses"
    if not answer.accepted and not refused and "arguments" not in kinds:
        return "Megatron refuses what no rule says it refuses"
    return ""


def report(draw: Draw, answer: Answer, violations: tuple[Violation, ...], how: str) -> dict[str, Any]:
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
        "answer": asdict(answer),
        "broken": [violation.rule for violation in violations],
    }


def ask(draw: Draw) -> tuple[Draw, Answer, tuple[Violation, ...]]:
    """Ask Megatron and the rules about one draw."""
    answer = judge(draw.workload, draw.layout, draw.cluster.world_size)
    return draw, answer, broken_rules(draw.layout, draw.workload, draw.cluster, OTHER_RELEASES)


def main() -> None:
    """Judge the case of every rule, and the random draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200, help="number of random layouts (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random layouts (default 0)")
    options = parser.parse_args()
    disagreements, broken_alone, counts = [], Counter[str](), Counter[str]()
    all_draws = chain(directed_draws(), islice(random_draws(options.seed), options.draws))
    # Megatron's hooks keep every model alive, so a process judges 100 draws only; a forked one has all imports already.
    with get_context("fork").Pool(PROCESSES, initializer=prepare, maxtasksperchild=100) as pool:
        for draw, answer, violations in pool.imap(ask, all_draws):
            counts["accepted" if answer.accepted else f"refused: {answer.refused_by}"] += 1
            counts["valid"] += not violations
            if len(violations) == 1:
                broken_alone[violations[0].rule] += 1
            if how := disagreement(answer, violations):
                disagreements.append(report(draw, answer, violations, how))
    json.dump(
        {"disagreements": disagreements, "counts": counts, "broken_alone": broken_alone}, sys.stdout, indent=2
    )


if __name__ == "__main__":
    main()
