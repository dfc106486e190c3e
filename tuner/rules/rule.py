"""The type of a rule, and of a violation: what a user reads about a layout that breaks a rule."""

from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Workload

Kind = Literal["megatron", "arguments", "policy", "canonical", "program"]
"""Who refuses a layout that breaks the rule.

- `megatron`: Megatron-Core refuses it, or would train it wrongly.
- `arguments`: only the argument checks in the training loop of Megatron-LM or Megatron Bridge refuse it.
- `policy`: megatune refuses it, unless the user switches the rule off (`lift` in a sweep file).
- `canonical`: the run may be legal, but another layout describes the same run, and only that one is tried.
- `program`: the device can't run it, or a package that it needs is missing there.
"""


class Predicate(Protocol):
    """Tells which layouts satisfy a rule."""

    def __call__(self, columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
        """Return whether each layout of `columns` satisfies the rule: one bool per layout, or one bool for all."""


class Explanation(Protocol):
    """Tells the user why a layout breaks a rule."""

    def __call__(self, layout: Layout, workload: Workload, cluster: Cluster) -> str:
        """Return what is wrong with `layout`, which breaks the rule, and what to change, with the relevant numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One condition that a valid layout satisfies."""

    id: str
    """The name in kebab-case, which `lift` in a sweep file and `Space.rejected` use."""
    kind: Kind
    """Who refuses a layout that breaks the rule."""
    knobs: frozenset[str]
    """The knobs that `holds` reads; empty if it reads the workload and the cluster alone."""
    holds: Predicate
    """Returns True for the layouts that satisfy the rule."""
    message: Explanation
    """Returns the message for a layout that breaks the rule."""
    source: str
    """The code that refuses a layout, as a path inside Megatron-LM's repository unless the text names another place."""
    since: str = ""
    """The first release of Megatron-Core that refuses layouts that break the rule, such as `0.17`; empty if the oldest
    supported release refuses them."""
    gone_in: str = ""
    """The first release of Megatron-Core known to accept layouts that break the rule, such as `0.19`; empty if the
    newest release still refuses them."""

    def mask(self, columns: Columns, workload: Workload, cluster: Cluster, rows: int) -> Bools:
        """Return one bool per layout of `columns`: whether the layout satisfies the rule.

        `rows` is the number of layouts in `columns`.
        """
        held = np.asarray(self.holds(columns, workload, cluster), dtype=np.bool_)
        return held if held.shape == (rows,) else np.broadcast_to(held, (rows,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule that a layout breaks."""

    rule: str
    """The rule's id."""
    kind: Kind
    """Who refuses the layout."""
    message: str
    """What is wrong with the layout, with its numbers, and what to change."""
    source: str
    """The code that refuses the layout."""


def rule(
    id: str,
    kind: Kind,
    knobs: str,
    *,
    holds: Predicate,
    message: Explanation,
    source: str,
    since: str = "",
    gone_in: str = "",
) -> Rule:
    """Return a Rule. `knobs` is one text that names the knobs that `holds` reads, separated by spaces."""
    return Rule(
        id=id,
        kind=kind,
        knobs=frozenset(knobs.split()),
        holds=holds,
        message=message,
        source=source,
        since=since,
        gone_in=gone_in,
    )


def remainder(name: str, value: int, divisor_name: str, divisor: int) -> str:
    """Return the equation of a rule of divisibility: `name (value) % (divisor_name = divisor) = r, must be 0`."""
    return f"{name} ({value}) % ({divisor_name} = {divisor}) = {value % divisor}, must be 0"


def implies(premise: Bools | bool, conclusion: Bools | bool) -> Bools:
    """Return a mask of the rows where `premise` is false or `conclusion` is true: the usual form of a rule."""
    holds: Bools = np.logical_or(np.logical_not(premise), conclusion)
    return holds


def not_all(*conditions: Bools) -> Bools:
    """Return a mask of the rows where at least one condition is false, as for conditions that exclude each other."""
    all_hold: Bools = reduce(np.logical_and, conditions)
    return ~all_hold
