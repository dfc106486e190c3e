"""Times one piece of work that all ranks do at once, and tables of such points."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from tuner.predict.calibration import TimeTable

Work = Callable[[], object]


@dataclass(slots=True, eq=False)
class TimedPoint:
    """One piece of work that all ranks do at once."""

    make: Callable[[], Work]
    """Makes the tensors of the work, and returns the work."""
    waits: bool = True
    """Whether a reading ends when the device has finished the work; else it ends when the host has launched it."""
    repeats: int = 0
    """How often the work is done in a batch that takes long enough; 0 until the first reading finds it."""
    readings_ms: list[float] = field(default_factory=list)
    """The slowest rank's time for the work, one per reading."""

    def read(self, batch_s: float, device: torch.device) -> None:
        """Time a batch of at least `batch_s` seconds, on tensors that are made anew."""
        work = self.make()
        work()
        repeats = self.repeats or 1
        taken_s = self._batch_s(work, repeats, device)
        while not self.repeats and taken_s < batch_s:
            # The number grows at most tenfold at once: the first few repeats may have been interrupted, or cold.
            repeats *= min(max(2, round(batch_s / taken_s)), 10)
            taken_s = self._batch_s(work, repeats, device)
        self.repeats = repeats
        self.readings_ms.append(taken_s / repeats * 1000)

    def _batch_s(self, work: Work, repeats: int, device: torch.device) -> float:
        """Return the slowest rank's time for `repeats` repeats, in seconds; it is equal on every rank."""
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if self.waits:
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)


@dataclass(frozen=True, slots=True)
class PointTable:
    """Points at every combination of some sizes."""

    sizes: tuple[tuple[int, ...], ...]
    """The sizes along each axis."""
    points: list[TimedPoint]
    """One point per combination, with the last axis running fastest."""

    @property
    def times(self) -> TimeTable:
        """The median time of each point over the passes."""
        return TimeTable(sizes=self.sizes, ms=tuple(median(point.readings_ms) for point in self.points))
