"""What a rule is, and the columns of layouts that it judges."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Workload

Kind = Literal["megatron", "arguments", "policy", "canonical", "program"]
"""Who refuses.

`megatron`: Megatron-Core itself, or it would train another model. `arguments`: only the argument checks of
Megatron-LM's or Megatron Bridge's training loop. `policy`: we do, and the user may lift it. `canonical`: the
run
may be legal, but another layout spells the same run. `program`: the device or a package cannot do it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One thing a layout must satisfy: a predicate over many layouts, and a message about one that breaks
    it.
    """

    id: str
    """Kebab-case; what `lift` in a sweep file and `Space.rejected` name."""
    kind: Kind
    knobs: frozenset[str]
    """The knobs that `holds` reads; empty if the workload and the cluster decide alone."""
    holds: Callable[[Columns, Workload, Cluster], Any]
    """True where the rule is kept: an array as long as the columns, or one bool for all of them."""
    message: Callable[[Layout, Workload, Cluster], str]
    """What is wrong, as an equation with its numbers, and what to change."""
    source: str
    """Who refuses, as a path inside Megatron-LM's repository unless said otherwise."""
    gone_in: str = ""
    """The first release of Megatron-Core known not to ask it, `0.19`; empty where the newest still does."""

    def mask(self, columns: Columns, workload: Workload, cluster: Cluster, rows: int) -> Bools:
        """Where the rule is kept, as an array of `rows` bools."""
        held = np.asarray(self.holds(columns, workload, cluster), dtype=np.bool_)
        return np.broadcast_to(held, (rows,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule that a layout breaks."""

    rule: str
    kind: Kind
    message: str
    source: str


def rule(
    id: str,
    kind: Kind,
    knobs: str,
    *,
    holds: Callable[[Columns, Workload, Cluster], Any],
    message: Callable[[Layout, Workload, Cluster], str],
    source: str,
    gone_in: str = "",
) -> Rule:
    """A Rule whose knobs are written as one string, separated by blanks."""
    return Rule(
        id=id,
        kind=kind,
        knobs=frozenset(knobs.split()),
        holds=holds,
        message=message,
        source=source,
        gone_in=gone_in,
    )


def remainder(what: str, value: int, parts: str, divisor: int) -> str:
    """`what (value) % (parts = divisor) = r, must be 0`: the equation of a rule of divisibility."""
    return f"{what} ({value}) % ({parts} = {divisor}) = {value % divisor}, must be 0"
