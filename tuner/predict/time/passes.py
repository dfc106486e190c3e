"""How the GPU's time in a forward or backward pass divides into kinds of work, for many layouts at once."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Floats


@dataclass(frozen=True, slots=True)
class PassTime:
    """The time of one pass through a module or a layer, by kind of work, in milliseconds.

    Each part is an array of shape [rows], or a number that is valid for all rows.
    """

    gemm_ms: Floats | float = 0.0
    """Time of matrix products outside core attention."""
    attention_ms: Floats | float = 0.0
    """Time of core attention."""
    elementwise_ms: Floats | float = 0.0
    """Time of work that the rate of the GPU's memory bounds."""
    tp_ms: Floats | float = 0.0
    """Time of those collectives of tensor and sequence parallelism that no computation hides."""
    cp_ms: Floats | float = 0.0
    """Time of the communication of context parallelism that no computation hides."""
    ep_ms: Floats | float = 0.0
    """Time of the communication of expert parallelism that no computation hides."""

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, factor: Floats | float) -> "PassTime":
        """Return the times of the pass, each multiplied by `factor`."""
        return PassTime(*(getattr(self, part.name) * factor for part in fields(self)))

    def at(self, rows: NDArray[np.intp]) -> "PassTime":
        """Return the times of the pass in the given rows, in the given order."""
        values = (getattr(self, part.name) for part in fields(self))
        return PassTime(*(value[rows] if isinstance(value, np.ndarray) else value for value in values))

    @property
    def total_ms(self) -> Floats | float:
        """Return the sum of all parts, in ms."""
        total: Floats | float = sum(getattr(self, part.name) for part in fields(self))
        return total


@dataclass(frozen=True, slots=True)
class ModuleTime:
    """The time of a module in the forward pass and in the backward pass."""

    forward: PassTime = PassTime()
    backward: PassTime = PassTime()

    def __add__(self, other: "ModuleTime") -> "ModuleTime":
        return ModuleTime(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> PassTime:
        """Return the time of both passes together."""
        return self.forward + self.backward

    def times(self, factor: Floats | float) -> "ModuleTime":
        """Return the times of both passes, each multiplied by `factor`."""
        return ModuleTime(self.forward.times(factor), self.backward.times(factor))

    def at(self, rows: NDArray[np.intp]) -> "ModuleTime":
        """Return the times of both passes in the given rows, in the given order."""
        return ModuleTime(self.forward.at(rows), self.backward.at(rows))
