"""What a machine was measured to do, and how long anything between the measured points takes on it; pure.

A `Calibration` holds tables of times at sizes a fixed factor apart. Between them times are interpolated in the
logarithms of size and time, exact for any power law; below the smallest size a time stays what it was there
(launching and latency are all that is left), and beyond the largest it grows in proportion (the rate is reached).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import isfinite, prod
from operator import add
from typing import ClassVar, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict

from tuner.core.workload import Precision
from tuner.errors import InputError
from tuner.files import STRICT, to_data

SCHEMA_VERSION: Final = 1
"""Raised when what is measured, or how, changes: older calibrations are then measured anew."""

Floats: TypeAlias = NDArray[np.float64]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a calibration depends on: hardware, software, and how many ranks share them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    device: Literal["cuda", "cpu"]
    name: str
    """The GPU's, or the processor's."""
    count: int
    """GPUs, or for device cpu the cores that the ranks share."""
    world_size: int
    """Ranks that work at the same time."""
    versions: Mapping[str, str]
    """Of torch, Python, and for device cuda the driver, CUDA and NCCL."""
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any of it."""
        text = json.dumps(to_data(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times in ms at every combination of some sizes, one axis or several."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sizes: tuple[tuple[int, ...], ...]
    """Of each axis, ascending."""
    ms: tuple[float, ...]
    """Of every combination, the last axis running fastest."""

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
        axes = [np.log2(np.asarray(axis, dtype=np.float64)) for axis in self.sizes]
        return axes, np.log2(np.asarray(self.ms, dtype=np.float64))

    def at(self, *where: ArrayLike) -> Floats:
        """The time in ms at a size on each axis; arrays broadcast."""
        axes, table = self._logarithms
        corners: list[tuple[NDArray[np.intp], Floats]] = [(np.zeros((), np.intp), np.ones(()))]
        beyond = np.zeros(())
        for axis, sizes, wanted in zip(axes, self.sizes, where, strict=True):
            place = np.log2(np.maximum(np.asarray(wanted, dtype=np.float64), sizes[0]))
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
        log_ms = reduce(add, (weight * table[index] for index, weight in corners))
        return np.asarray(np.exp2(log_ms + beyond), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one machine was measured to do, with all of its ranks at work at once. Times in ms."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    machine: Machine
    measured_at: str
    """ISO 8601, UTC."""
    host_us: float
    """To launch one eager operation of a module under autograd, in microseconds. On CPU, where an operation is
    finished when it returns, the least that any costs."""
    gemm: Mapping[Precision, Times]
    """By precision; axes rows, out, into. With its launch, where that takes longer; so too the others."""
    copy: Times
    """An elementwise operation; axis bytes, read and written together."""
    collectives: Mapping[Collective, Times] = field(default_factory=dict)
    """By kind, in groups of neighbouring ranks, all groups at once; axes ranks, bytes. Empty for one rank alone."""
    strided_collectives: Mapping[Collective, Times] = field(default_factory=dict)
    """The same in groups of ranks as far apart as they can be."""

    def __post_init__(self) -> None:
        if not (isfinite(self.host_us) and self.host_us > 0):
            raise ValueError(f"host_us must be above 0, not {self.host_us}")
        if not self.gemm or any(len(times.sizes) != 3 for times in self.gemm.values()):
            raise ValueError("gemm needs a precision at least, and three axes: rows, out, into")
        if len(self.copy.sizes) != 1:
            raise ValueError("copy needs one axis: bytes")
        both = [*self.collectives.values(), *self.strided_collectives.values()]
        if any(len(times.sizes) != 2 for times in both):
            raise ValueError("collectives need two axes: ranks, bytes")
        if self.collectives.keys() != self.strided_collectives.keys():
            raise ValueError("collectives and strided_collectives must be of the same kinds")

    def gemm_ms(self, rows: ArrayLike, out: ArrayLike, into: ArrayLike, precision: Precision) -> Floats:
        """The product of a [rows, into] matrix and an [into, out] one.

        Backward, the gradient of the input is `gemm_ms(rows, into, out)`, that of the weights
        `gemm_ms(out, into, rows)`.

        Raises:
            InputError: if the precision was not measured (`precision in calibration.gemm` tells).
        """
        if precision not in self.gemm:
            raise InputError(
                f"the calibration of {self.machine.name} has no products in {precision} "
                f"(it has {', '.join(self.gemm)})"
            )
        return self.gemm[precision].at(rows, out, into)

    def copy_ms(self, moved_bytes: ArrayLike) -> Floats:
        """An elementwise operation that reads and writes so many bytes together."""
        return self.copy.at(moved_bytes)

    def collective_ms(
        self, kind: Collective, whole_bytes: ArrayLike, ranks: ArrayLike, strided: bool = False
    ) -> Floats:
        """A collective among so many ranks; a lone rank needs no time.

        `whole_bytes` is the whole buffer as nccl-tests counts it (doc/PERFORMANCE.md): what an all-reduce and an
        all-to-all hold on every rank, the gathered side of an all-gather, the scattered side of a reduce-scatter;
        of a send the message, each rank of the group sending one and receiving one. Between measured group
        sizes the time is interpolated; in larger groups the latency grows by the hops of a ring, n - 1, and the
        rest by the share of the buffer that leaves a rank, (n - 1) / n, except for a send.

        Raises:
            ValueError: if a group has several ranks and the machine was measured with one.
        """
        size = np.asarray(ranks, dtype=np.float64)
        if kind not in self.collectives:
            if np.any(size > 1):
                raise ValueError(
                    f"no {kind} was measured: the calibration is of {self.machine.world_size} rank"
                )
            return np.zeros(np.broadcast(size, np.asarray(whole_bytes)).shape)
        times = (self.strided_collectives if strided else self.collectives)[kind]
        largest = float(times.sizes[0][-1])
        found = times.at(np.minimum(size, largest), whole_bytes)
        if kind != "send" and np.any(size > largest):
            latency = times.at(largest, times.sizes[1][0])
            hops = np.maximum(size - 1, 1) / (largest - 1)
            share = hops * largest / np.maximum(size, 1)
            more = latency * hops + np.maximum(found - latency, 0.0) * share
            found = np.where(size > largest, more, found)
        return np.where(size > 1, found, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """What to measure: everything that the calibration program needs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    machine: Machine
    precisions: tuple[Precision, ...]
    """Of the matrix products."""
    gemm_sizes: tuple[int, ...]
    """Of rows, out and into alike."""
    copy_bytes: tuple[int, ...]
    message_bytes: tuple[int, ...]
    passes: int
    """Readings of each point; their median counts."""
    batch_s: float
    """How long a reading's batch of repetitions takes at least."""


_KIB: Final = 1024
_MIB: Final = 1024**2


def plan_calibration(machine: Machine, precisions: tuple[Precision, ...]) -> CalibrationPlan:
    """What to measure on a machine: about a minute's work."""
    if machine.device == "cpu":
        # A time slice of the scheduler is some 4 ms: a batch spans many, since the ranks share their cores.
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
