"""What pruning would have cost where everything was measured: `python -m tests.bench.audit`.

Of every recorded group and every landscape: layouts that ran and that are predicted too large to be launched; layouts
that ran and that some layout which ran out of memory rules out, in whatever order they are tried; and pairs that both
ran, one of which is said to need as much memory as the other and measured less.
"""

import numpy as np
from numpy.typing import NDArray

from tests.bench.problems import MeasuredProblem, problems
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.space.table import layout_at

ROUNDED = 1e-6
"""Peaks are published in GiB with six digits."""


def wrongly_too_large(problem: MeasuredProblem) -> NDArray[np.intp]:
    """Rows that ran, and that a sweep would never launch."""
    fits = fit_probabilities(problem.table, problem.workload, problem.cluster)
    return np.flatnonzero((fits < MIN_FIT) & problem.ran)


def wrongly_dominated(problem: MeasuredProblem) -> list[tuple[int, int]]:
    """Pairs of a row that ran out of memory and a row that ran, of which the first rules out the second."""
    return [
        (int(row), int(other))
        for row in np.flatnonzero(~problem.ran)
        for other in np.flatnonzero(_dominated(problem, int(row)) & problem.ran)
    ]


def _rightly_too_large(problem: MeasuredProblem) -> int:
    fits = fit_probabilities(problem.table, problem.workload, problem.cluster)
    return int(((fits < MIN_FIT) & ~problem.ran).sum())


def _rightly_dominated(problem: MeasuredProblem) -> int:
    """Rows that ran out of memory, and that at least one other such row would have saved a launch."""
    ooms = np.flatnonzero(~problem.ran)
    saved = {
        int(other) for row in ooms for other in np.flatnonzero(_dominated(problem, int(row))) if other != row
    }
    return len(saved & set(ooms.tolist()))


def smaller_than_said(problem: MeasuredProblem) -> tuple[list[tuple[int, int]], int]:
    """Pairs of rows that ran, of which the second is said to need no less memory and measured less; and all pairs."""
    if problem.peak_gib is None:
        return [], 0
    wrong, pairs = [], 0
    for row in np.flatnonzero(problem.ran):
        others = np.flatnonzero(_dominated(problem, int(row)) & problem.ran)
        pairs += len(others) - 1
        less = problem.peak_gib[others] < problem.peak_gib[row] - ROUNDED
        wrong += [(int(row), int(other)) for other in others[less]]
    return wrong, pairs


def _dominated(problem: MeasuredProblem, row: int) -> NDArray[np.bool_]:
    layout = layout_at(problem.table, row)
    return needs_at_least_as_much_memory(problem.table, layout, problem.workload, problem.cluster)


def main() -> None:
    """Print the audit of every problem in which something is wrong, and the totals."""
    totals: dict[str, int] = {}
    for problem in problems():
        large, dominated = wrongly_too_large(problem), wrongly_dominated(problem)
        smaller, pairs = smaller_than_said(problem)
        _report(problem, large, dominated, smaller)
        facts = {
            "problems": 1,
            "layouts that ran": int(problem.ran.sum()),
            "layouts that ran out of memory": int((~problem.ran).sum()),
            "of these predicted too large, and never launched": _rightly_too_large(problem),
            "of these ruled out by another OOM": _rightly_dominated(problem),
            "ran, yet predicted too large": len(large),
            "optima predicted too large": int(problem.best in large),
            "ran, yet ruled out by an OOM": len({other for _, other in dominated}),
            "optima ruled out by an OOM": int(problem.best in {other for _, other in dominated}),
            "pairs said to need no less": pairs,
            "pairs that measured less": len(smaller),
        }
        totals = {name: totals.get(name, 0) + count for name, count in facts.items()}
    for name, count in totals.items():
        print(f"{count:>8,}  {name}")


def _report(
    problem: MeasuredProblem,
    large: NDArray[np.intp],
    dominated: list[tuple[int, int]],
    smaller: list[tuple[int, int]],
) -> None:
    def label(row: int) -> str:
        return layout_at(problem.table, row).label() + (" (the optimum)" if row == problem.best else "")

    for row in large:
        print(f"{problem.name}: {label(int(row))} ran, yet is predicted too large")
    for row, other in dominated:
        print(f"{problem.name}: {label(other)} ran, yet the OOM of {label(row)} rules it out")
    for row, other in smaller:
        assert problem.peak_gib is not None
        print(
            f"{problem.name}: {label(other)} measured {problem.peak_gib[other]:.6f} GiB, {label(row)} "
            f"{problem.peak_gib[row]:.6f} GiB, and is said to need no less"
        )


if __name__ == "__main__":
    main()
