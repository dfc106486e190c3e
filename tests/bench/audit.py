"""What pruning would have cost in problems of which every layout was measured.

Run `python -m tests.bench.audit`. In every recorded group and every landscape it counts three kinds of errors: layouts
that ran but are predicted too large to be launched; layouts that ran but that some layout which ran out of memory rules
out, in whatever order they are tried; and pairs that both ran, of which one is said to need no less memory than the
other but measured less.
"""

import numpy as np
from numpy.typing import NDArray

from tests.bench.problems import MeasuredProblem, problems
from tuner.predict.dominance import needs_at_least_as_much_memory
from tuner.predict.feasibility import MIN_FIT, fit_probabilities
from tuner.space.table import layout_at

ROUNDED = 1e-6
"""Differences in GiB that say nothing: landscapes state peaks with six digits."""


def wrongly_too_large(problem: MeasuredProblem) -> NDArray[np.intp]:
    """Return the rows that ran although a sweep would never launch them."""
    fits = fit_probabilities(problem.table, problem.workload, problem.cluster)
    return np.flatnonzero((fits < MIN_FIT) & problem.ran)


def wrongly_dominated(problem: MeasuredProblem) -> list[tuple[int, int]]:
    """Return pairs of a row that ran out of memory and a row that ran although the first rules it out."""
    return [
        (int(row), int(other))
        for row in np.flatnonzero(~problem.ran)
        for other in np.flatnonzero(_dominated(problem, int(row)) & problem.ran)
    ]


def _rightly_too_large(problem: MeasuredProblem) -> int:
    """Return how many rows ran out of memory that a sweep would never launch."""
    fits = fit_probabilities(problem.table, problem.workload, problem.cluster)
    return int(((fits < MIN_FIT) & ~problem.ran).sum())


def _rightly_dominated(problem: MeasuredProblem) -> int:
    """Return how many rows ran out of memory that another such row rules out."""
    out_of_memory = np.flatnonzero(~problem.ran)
    ruled_out = np.zeros(len(problem.table), dtype=np.bool_)
    for row in out_of_memory:
        others = _dominated(problem, int(row))
        others[row] = False
        ruled_out |= others
    return int(ruled_out[out_of_memory].sum())


def smaller_than_said(problem: MeasuredProblem) -> tuple[list[tuple[int, int]], int]:
    """Return pairs of rows that ran, of which the second is said to need no less memory and measured less.

    The second value is the number of all pairs of which the second is said to need no less.
    """
    if problem.peak_gib is None:
        return [], 0
    wrong_pairs: list[tuple[int, int]] = []
    pairs = 0
    for row in np.flatnonzero(problem.ran):
        others = np.flatnonzero(_dominated(problem, int(row)) & problem.ran)
        pairs += len(others) - 1
        measured_less = problem.peak_gib[others] < problem.peak_gib[row] - ROUNDED
        wrong_pairs += [(int(row), int(other)) for other in others[measured_less]]
    return wrong_pairs, pairs


def _dominated(problem: MeasuredProblem, row: int) -> NDArray[np.bool_]:
    """Return the rows that are said to need at least as much memory as `row`, itself included."""
    layout = layout_at(problem.table, row)
    return needs_at_least_as_much_memory(problem.table, layout, problem.workload, problem.cluster)


def main() -> None:
    """Print every error, and the totals over all problems."""
    totals: dict[str, int] = {}
    for problem in problems():
        large, dominated = wrongly_too_large(problem), wrongly_dominated(problem)
        smaller, pairs = smaller_than_said(problem)
        _print_errors(problem, large, dominated, smaller)
        counts = {
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
        totals = {name: totals.get(name, 0) + count for name, count in counts.items()}
    for name, count in totals.items():
        print(f"{count:>8,}  {name}")


def _print_errors(
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
