"""What a sweep searches, and how: the part of its configuration that choosing a row depends on."""

from dataclasses import dataclass
from typing import Literal

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.space.enumeration import Domain
from tuner.trial.contract import Measurement

SamplerName = Literal["predicted", "random", "tpe", "gp", "grid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The layouts to search and the strategy that orders them."""

    workload: Workload
    cluster: Cluster
    domain: Domain
    """Candidate values of every knob that is not at its default."""
    refined: tuple[str, ...]
    """Knobs that the refinement varies around the best layouts of the domain; empty if there is no refinement."""
    lifted: frozenset[str]
    """Rules that may be broken."""
    baseline: Layout | None
    sampler: SamplerName
    seed: int
    measurement: Measurement
