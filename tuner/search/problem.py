"""What a sweep searches and how: the part of a sweep's configuration that the choice of a row depends on."""

from dataclasses import dataclass
from typing import Literal

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.space.domain import Domain
from tuner.trial.contract import Measurement

SamplerName = Literal["predicted", "random", "tpe", "gp", "grid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The layouts to search and the strategy that orders them."""

    workload: Workload
    cluster: Cluster
    domain: Domain
    """The candidate values of each knob of the grid; all other knobs keep their defaults."""
    refined: tuple[str, ...]
    """The knobs that the refinement varies around the best layouts of the grid; empty if there is no refinement."""
    lifted: frozenset[str]
    """The ids of rules that layouts may break."""
    baseline: Layout | None
    """The layout to beat; None if the sweep file states none."""
    sampler: SamplerName
    seed: int
    measurement: Measurement
