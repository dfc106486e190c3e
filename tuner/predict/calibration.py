"""Times that were measured on a machine, and the interpolated time of work of any size. This module measures nothing.

A `Calibration` holds tables of times at a few sizes. Between two sizes it interpolates the logarithm of the time over
the logarithm of the size, which is exact for any power law. Below the smallest size the time stays that of the smallest
size, because only launches and latency are left. Beyond the largest size the time grows in proportion to the size,
because the full rate is reached.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import isfinite, prod
from operator import add
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict

from tuner.core.columns import Floats
from tuner.core.workload import Precision
from tuner.errors import InputError
from tuner.files import STRICT, to_data
from tuner.printable import OneLine

SCHEMA_VERSION: Final = 1
"""Version of what the calibration program measures and how. A machine with a calibration of an older version is
measured again."""

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a calibration depends on: the hardware, the software, and the number of ranks that share the hardware."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    device: Literal["cuda", "cpu"]
    name: OneLine
    """Name of the GPU, or of the processor for device cpu."""
    count: int
    """Number of GPUs, or of the cores that the ranks share for device cpu."""
    world_size: int
    """Number of ranks that work at the same time."""
    versions: Mapping[OneLine, OneLine]
    """Versions by name: torch and Python; for device cuda also the driver, CUDA and NCCL."""
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify the machine: they change if any field changes."""
        text = json.dumps(to_data(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class TimeTable:
    """Measured times in ms, one for every combination of the sizes along one or several axes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sizes: tuple[tuple[int, ...], ...]
    """The ascending sizes along each axis, one tuple per axis."""
    ms: tuple[float, ...]
    """The time in ms of each combination of sizes; the last axis varies fastest."""

    def __post_init__(self) -> None:
        for axis in self.sizes:
            if not axis or axis[0] < 1 or list(axis) != sorted(set(axis)):
                raise ValueError(f"sizes must be at least 1 and ascend, not {axis}")
        combinations = prod(map(len, self.sizes))
        if len(self.ms) != combinations:
            lengths = " x ".join(str(len(axis)) for axis in self.sizes)
            raise ValueError(f"{len(self.ms)} times for {lengths} = {combinations} combinations of sizes")
        if not all(isfinite(value) and value > 0 for value in self.ms):
            raise ValueError("every time must be a number above 0")

    @cached_property
    def _logarithms(self) -> tuple[list[Floats], Floats]:
        """Return log2 of the sizes along each axis, and log2 of the times in ms."""
        axes = [np.log2(np.asarray(axis, dtype=np.float64)) for axis in self.sizes]
        return axes, np.log2(np.asarray(self.ms, dtype=np.float64))

    def at(self, *sizes: ArrayLike) -> Floats:
        """Return the interpolated time in ms of work with the given sizes, one argument per axis.

        Arrays of sizes broadcast against each other to the shape of the result.
        """
        axes, log_ms = self._logarithms
        # The corners of the table's cell in which the sizes lie: indices into `log_ms`, and interpolation weights.
        corners: list[tuple[NDArray[np.intp], Floats]] = [(np.zeros((), np.intp), np.ones(()))]
        beyond = np.zeros(())
        for axis, measured_sizes, wanted in zip(axes, self.sizes, sizes, strict=True):
            place = np.log2(np.maximum(np.asarray(wanted, dtype=np.float64), measured_sizes[0]))
            beyond = beyond + np.maximum(place - axis[-1], 0.0)
            low = np.searchsorted(axis[1:-1], place, side="right")
            high = np.minimum(low + 1, len(axis) - 1)
            width = np.where(high > low, axis[high] - axis[low], 1.0)
            share = np.minimum((place - axis[low]) / width, 1.0)
            corners = [
                (index * len(axis) + end, weight * part)
                for index, weight in corners
                for end, part in ((low, 1.0 - share), (high, share))
            ]
        interpolated = reduce(add, (weight * log_ms[index] for index, weight in corners))
        return np.asarray(np.exp2(interpolated + beyond), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Times in ms that were measured on one machine while all of its ranks worked at the same time.

    If the host takes longer to launch an operation than the device takes to run it, the time is that of the launch.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    machine: Machine
    measured_at: OneLine
    """Time of the measurement: ISO 8601, UTC."""
    host_us: float
    """Microseconds that the host needs to launch one eager operation of a module under autograd. On CPU an operation
    runs during its launch, so this is the shortest time that any operation takes."""
    gemm: Mapping[Precision, TimeTable]
    """Times of matrix products by precision; the three axes are the arguments `rows`, `out` and `into` of `gemm_ms`."""
    copy: TimeTable
    """Times of one elementwise operation; the axis is the sum of the bytes that it reads and writes."""
    collectives: Mapping[Collective, TimeTable] = field(default_factory=dict)
    """Times of collectives by kind, in groups of neighbouring ranks, while all groups communicate at the same time. The
    two axes are the number of ranks in a group and the bytes of the whole buffer (see `collective_ms`). Empty if the
    machine was measured with one rank."""
    strided_collectives: Mapping[Collective, TimeTable] = field(default_factory=dict)
    """Times of collectives by kind, as in `collectives`, but in groups whose ranks lie as far apart as they can: one
    group has ranks 0, n, 2n, ... of a world that is divided into n groups."""
    suspicions: tuple[OneLine, ...] = ()
    """Reasons not to trust the times, one line each: the machine was throttled or shared while they were measured."""

    def __post_init__(self) -> None:
        if not (isfinite(self.host_us) and self.host_us > 0):
            raise ValueError(f"host_us must be above 0, not {self.host_us}")
        if not self.gemm or any(len(table.sizes) != 3 for table in self.gemm.values()):
            raise ValueError("gemm needs at least one precision, and three axes: rows, out, into")
        if len(self.copy.sizes) != 1:
            raise ValueError("copy needs one axis: bytes")
        tables = [*self.collectives.values(), *self.strided_collectives.values()]
        if any(len(table.sizes) != 2 for table in tables):
            raise ValueError("collectives need two axes: ranks, bytes")
        if self.collectives.keys() != self.strided_collectives.keys():
            raise ValueError("collectives and strided_collectives must be of the same kinds")

    def gemm_ms(self, rows: ArrayLike, out: ArrayLike, into: ArrayLike, precision: Precision) -> Floats:
        """Return the time in ms of the product of a [rows, into] matrix and an [into, out] matrix.

        In the backward pass the gradient of the input takes `gemm_ms(rows, into, out)`, and the gradient of the weights
        takes `gemm_ms(out, into, rows)`.

        Raises:
            InputError: if the calibration has no products in `precision`.
        """
        if precision not in self.gemm:
            raise InputError(
                f"the calibration of {self.machine.name} has no matrix products in {precision} "
                f"(it has {', '.join(self.gemm)})"
            )
        return self.gemm[precision].at(rows, out, into)

    def copy_ms(self, moved_bytes: ArrayLike) -> Floats:
        """Return the time in ms of an elementwise operation whose reads and writes add up to `moved_bytes`."""
        return self.copy.at(moved_bytes)

    def collective_ms(
        self, kind: Collective, whole_bytes: ArrayLike, ranks: ArrayLike, strided: bool = False
    ) -> Floats:
        """Return the time in ms of one collective in a group of `ranks` ranks; 0 for one rank.

        Between two measured group sizes the time is interpolated. In a group larger than any measured one, the latency
        grows with the hops of a ring, n - 1, and the rest of the time grows with the share of the buffer that leaves a
        rank, (n - 1) / n. The time of a send does not depend on the size of the group.

        Args:
            kind: The collective.
            whole_bytes: Bytes of the whole buffer, as nccl-tests counts it (doc/PERFORMANCE.md). For an all-reduce and
                an all-to-all this is the buffer of each rank, for an all-gather the gathered buffer, for a
                reduce-scatter the buffer before the scatter. For a send it is the message; each rank sends one and
                receives one.
            ranks: Number of ranks in the group.
            strided: Whether the ranks of a group lie far apart (see `strided_collectives`) instead of next to each
                other.

        Raises:
            ValueError: if a group has several ranks but no time of `kind` was measured, as on a machine with one rank.
        """
        size = np.asarray(ranks, dtype=np.float64)
        if kind not in self.collectives:
            if np.any(size > 1):
                raise ValueError(
                    f"no {kind} was measured: the calibration is of {self.machine.world_size} rank"
                )
            return np.zeros(np.broadcast(size, np.asarray(whole_bytes)).shape)
        table = (self.strided_collectives if strided else self.collectives)[kind]
        largest = float(table.sizes[0][-1])
        time_ms = table.at(np.minimum(size, largest), whole_bytes)
        if kind != "send" and np.any(size > largest):
            latency = table.at(largest, table.sizes[1][0])
            hops = np.maximum(size - 1, 1) / (largest - 1)
            share = hops * largest / np.maximum(size, 1)
            extrapolated_ms = latency * hops + np.maximum(time_ms - latency, 0.0) * share
            time_ms = np.where(size > largest, extrapolated_ms, time_ms)
        return np.where(size > 1, time_ms, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """The whole input of the calibration program: the machine, and the work and sizes that the program times on it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    machine: Machine
    precisions: tuple[Precision, ...]
    """Precisions of the matrix products."""
    gemm_sizes: tuple[int, ...]
    """Sizes along each of the three axes of a matrix product; every combination is timed."""
    copy_bytes: tuple[int, ...]
    """Sizes of the elementwise operation: the sum of the bytes that it reads and writes."""
    message_bytes: tuple[int, ...]
    """Sizes of the whole buffer of a collective, in bytes."""
    passes: int
    """How many times each size is timed; the calibration holds the median of these times."""
    batch_s: float
    """Minimum duration of one timing in seconds: the work is repeated for at least this long, and the mean is taken."""


_KIB: Final = 1024


def plan_calibration(machine: Machine, precisions: tuple[Precision, ...]) -> CalibrationPlan:
    """Return the plan of a calibration of `machine`; the calibration takes about a minute."""
    if machine.device == "cpu":
        # The ranks share cores, and a time slice of the scheduler is about 4 ms: a timing spans many slices.
        return CalibrationPlan(
            machine=machine,
            precisions=precisions,
            gemm_sizes=(16, 48, 128, 384, 1024),
            copy_bytes=tuple(_KIB * 8**step for step in range(6)),
            message_bytes=(_KIB, *(_KIB * 4**step for step in range(2, 8))),
            passes=3,
            batch_s=0.04,
        )
    return CalibrationPlan(
        machine=machine,
        precisions=precisions,
        gemm_sizes=(64, 256, 1024, 4096, 16384),
        copy_bytes=tuple(64 * _KIB * 8**step for step in range(5)),
        message_bytes=tuple(_KIB * 4**step for step in range(10)),
        passes=3,
        batch_s=0.01,
    )
