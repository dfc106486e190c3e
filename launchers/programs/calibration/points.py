"""Points, each of which times one piece of work that all ranks do at the same time, and tables of points."""

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
    """One piece of work that all ranks do at the same time, and its measured times."""

    make: Callable[[], Work]
    """Creates the tensors of the work, and returns the function that does the work."""
    waits: bool = True
    """Whether a reading ends when the device has finished the work; if not, it ends when the host has launched the
    work."""
    repeats: int = 0
    """How often the work is repeated in a batch; 0 until the first reading finds a number that takes long enough."""
    readings_ms: list[float] = field(default_factory=list)
    """The slowest rank's time for doing the work once, in ms, one value per reading."""

    def read(self, batch_s: float, device: torch.device) -> None:
        """Take one reading: time a batch of repetitions on newly created tensors.

        The first reading chooses the number of repetitions so that a batch takes at least `batch_s` seconds.
        """
        work = self.make()
        work()
        repeats = self.repeats or 1
        taken_s = self._batch_s(work, repeats, device)
        while not self.repeats and taken_s < batch_s:
            # The number grows at most tenfold at once: the first few repeats may have been slow by chance or cold.
            repeats *= min(max(2, round(batch_s / taken_s)), 10)
            taken_s = self._batch_s(work, repeats, device)
        self.repeats = repeats
        self.readings_ms.append(taken_s / repeats * 1000)

    def _batch_s(self, work: Work, repeats: int, device: torch.device) -> float:
        """Return the time in seconds that the slowest rank takes for doing the work `repeats` times.

        Every rank returns the same time.
        """
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
    """One point for every combination of sizes, such as the rows and the widths of a matrix product."""

    sizes: tuple[tuple[int, ...], ...]
    """The sizes along each axis of the table."""
    points: list[TimedPoint]
    """One point per combination, in the order in which the size along the last axis changes fastest."""

    @property
    def times(self) -> TimeTable:
        """Return the median time of each point over its readings, in ms."""
        return TimeTable(sizes=self.sizes, ms=tuple(median(point.readings_ms) for point in self.points))
