"""How the GPU's time in a forward or backward pass divides among kinds of work, for many layouts at once."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Floats


@dataclass(frozen=True, slots=True)
class PassTime:
    """The time of one pass through a module or a layer, by kind of work.

    Each part is an array of shape [rows], or a number that holds for all rows.
    """

    gemm_ms: Floats | float = 0.0
    """Matrix products outside core attention."""
    attention_ms: Floats | float = 0.0
    """Core attention."""
    elementwise_ms: Floats | float = 0.0
    """Work that the rate of the GPU's memory bounds."""
    tp_ms: Floats | float = 0.0
    """Collectives of tensor and sequence parallelism that nothing hides."""
    cp_ms: Floats | float = 0.0
    """Communication of context parallelism that nothing hides."""
    ep_ms: Floats | float = 0.0
    """Communication of expert parallelism that nothing hides."""

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, factor: Floats | float) -> "PassTime":
        """Return the pass with every part multiplied by `factor`."""
        return PassTime(*(getattr(self, part.name) * factor for part in fields(self)))

    def at(self, rows: NDArray[np.intp]) -> "PassTime":
        """Return the pass with every part at the given rows."""
        values = (getattr(self, part.name) for part in fields(self))
        return PassTime(*(value[rows] if isinstance(value, np.ndarray) else value for value in values))

    @property
    def total_ms(self) -> Floats | float:
        """The sum of all parts."""
        total: Floats | float = sum(getattr(self, part.name) for part in fields(self))
        return total


@dataclass(frozen=True, slots=True)
class ModuleTime:
    """The time of a module in the forward and in the backward pass."""

    forward: PassTime = PassTime()
    backward: PassTime = PassTime()

    def __add__(self, other: "ModuleTime") -> "ModuleTime":
        return ModuleTime(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> PassTime:
        """Both passes together."""
        return self.forward + self.backward

    def times(self, factor: Floats | float) -> "ModuleTime":
        """Return the module with both passes multiplied by `factor`."""
        return ModuleTime(self.forward.times(factor), self.backward.times(factor))

    def at(self, rows: NDArray[np.intp]) -> "ModuleTime":
        """Return the module with both passes at the given rows."""
        return ModuleTime(self.forward.at(rows), self.backward.at(rows))
