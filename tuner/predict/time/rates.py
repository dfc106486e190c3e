"""How fast the ranks do one thing each: a product, a copy, a collective, a launch. Milliseconds throughout.

`Rates` answers from the figures that the cluster states; `MeasuredRates` from a calibration of the machine, and
from the cluster's figures where that covers nothing.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.workload import Precision, Workload
from tuner.errors import InputError
from tuner.predict.calibration import Calibration, Collective
from tuner.predict.time import collectives
from tuner.predict.time.collectives import Floats, Group

GEMM_EFFICIENCY: Final = 0.75
"""Share of the dense peak that a large matrix product reaches: cuBLAS on A100 to B200 gives 0.7 to 0.8."""
MEMORY_EFFICIENCY: Final = 0.8
"""Share of the memory's rate that element-wise kernels reach: copies give 0.8 to 0.9."""
TILE_ROWS: Final = 128
"""Rows of an output tile of cuBLAS: the last tile of each expert is half empty on average."""
KERNEL_MS: Final = 3e-3
"""Ramp and tail of one kernel, in which the GPU is not full."""
LAUNCH_MS: Final = 0.011
"""The host's work for one operation in eager PyTorch, launched kernels and views together, where no calibration
tells: 5 to 20 us."""
FLEX_EFFICIENCY: Final = 0.9
"""Share of a link's rate that DeepEP's dispatch and combine reach: 153 to 158 of NVLink's 160 GB/s on H800, 43 to
47 of the network's 50 (README of deepseek-ai/DeepEP, normal kernels)."""

OPERAND_BYTES: Final[Mapping[Precision, float]] = {
    **{"fp32": 4.0, "bf16": 2.0, "fp16": 2.0},
    **{"fp8": 1.0, "mxfp8": 1.0, "nvfp4": 0.5},
}
"""Of one element that a matrix product reads."""
NARROW: Final = ("fp8", "mxfp8", "nvfp4")
"""Formats of matrix products alone: everything else is in bf16."""


class Rates:
    """What the cluster's stated figures allow. Arrays broadcast; a layout is a row.

    Raises:
        InputError: if the cluster states no peak for the workload's precision.
    """

    def __init__(self, workload: Workload, cluster: Cluster) -> None:
        self.cluster, self._precision = cluster, workload.precision
        peaks = cluster.gpu.peak_tflops
        if workload.precision not in peaks:
            raise InputError(
                f"cluster '{cluster.name}': key 'gpu.peak_tflops' states none for {workload.precision}; "
                f"add it, or choose a precision of {', '.join(peaks)}"
            )
        self.state_bytes = 4.0 if workload.precision == "fp32" else 2.0
        """Of one element of an activation."""
        self.gradient_bytes = 4.0 if workload.grad_reduce_in_fp32 else self.state_bytes
        """Of one weight's gradient, as it is added up and reduced."""
        self.parameter_bytes = 1.0 if workload.fp8_param else self.state_bytes
        """Of one weight, as the distributed optimizer gathers it."""
        self._operand_bytes = OPERAND_BYTES[workload.precision]
        self._bytes_per_ms = MEMORY_EFFICIENCY * cluster.gpu.memory_bandwidth_gb_per_s * 1e6
        self._flops_per_ms = GEMM_EFFICIENCY * peaks[workload.precision] * 1e9
        # Attention computes in 16 bits under the narrow formats.
        wide = workload.precision in NARROW and "bf16" in peaks
        self._attention_peak = peaks["bf16"] if wide else peaks[workload.precision]
        self.host_runs_ahead = cluster.device == "cuda"
        """Whether the host launches beside the device's work; on CPU every operation ends before the next."""
        self.kernel_ms = KERNEL_MS if self.host_runs_ahead else 0.0
        self.crowding = max(1.0, cluster.gpus_per_node / (cluster.cores or cluster.gpus_per_node))
        """Ranks a core: a rank that waits lends its share of it to the others."""
        self.launch_ms = LAUNCH_MS * self.crowding

    def attention_ms(self, flops: Floats, efficiency: float) -> Floats:
        """Attention at a share of what large matrix products reach."""
        return flops / (efficiency * GEMM_EFFICIENCY * self._attention_peak * 1e9)

    def fp32_ms(self, flops: Floats) -> Floats:
        """A matrix product that stays in fp32 whatever the precision."""
        peaks = self.cluster.gpu.peak_tflops
        return flops / (GEMM_EFFICIENCY * peaks.get("fp32", peaks[self._precision]) * 1e9)

    def product_ms(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> tuple[Floats, Floats]:
        """rows x into @ into x out, over `matrices` weights that share the rows; and the two products backward.

        FLOPs at the rate that large products reach and bytes at the memory's are added, since a kernel's prologue
        and epilogue do not hide in its main loop, so that thin shapes are slow by themselves.
        """
        padded = rows + np.where(np.asarray(matrices) > 1, matrices * (TILE_ROWS / 2), 0.0)
        flops_ms = 2 * padded * out * into / self._flops_per_ms
        weights = matrices * out * into
        read, written = self._operand_bytes, self.state_bytes
        forward = read * (rows * into + weights) + written * rows * out
        backward = read * (2 * rows * out + rows * into + weights) + written * rows * into
        cast, accumulated = self._beside_ms(rows * into, rows * out, weights)
        return (
            flops_ms + forward / self._bytes_per_ms + cast,
            2 * flops_ms + backward / self._bytes_per_ms + accumulated,
        )

    def _beside_ms(self, inputs: Floats, outputs: Floats, weights: Floats | float) -> tuple[Floats, Floats]:
        """What goes with the products of so many elements: casts, and backward the adding up of gradients.

        A narrow operand is first read wide, and written narrow twice: as it is and transposed.
        """
        narrow = self._operand_bytes < self.state_bytes
        cast = (self.state_bytes + 2 * self._operand_bytes) if narrow else 0.0
        return self.moved_ms(cast * inputs), self.moved_ms(cast * outputs + 2 * self.gradient_bytes * weights)

    def moved_ms(self, moved_bytes: Floats, operations: float = 1.0) -> Floats:
        """What element-wise operations that read and write so many bytes together take beyond their launch."""
        return moved_bytes / self._bytes_per_ms

    def gather_ms(self, whole_bytes: Floats, ranks: Group, kind: Collective = "all_gather") -> Floats:
        """An all-gather to, or a reduce-scatter from, `whole_bytes` on every rank."""
        return collectives.gather_ms(whole_bytes, ranks, self.cluster)

    def reduce_ms(self, whole_bytes: Floats, ranks: Group) -> Floats:
        """An all-reduce of `whole_bytes`: a reduce-scatter and an all-gather."""
        return 2 * collectives.gather_ms(whole_bytes, ranks, self.cluster)

    def measured(self, kind: Collective) -> bool:
        """Whether what such a collective takes was measured."""
        return False

    def exchange_ms(self, inside_bytes: Floats, across_bytes: Floats, ranks: Group) -> Floats:
        """An all-to-all in which a rank sends so much inside its NVLink domain, and so much out of it."""
        return collectives.exchange_ms(inside_bytes, across_bytes, ranks, self.cluster)

    def send_ms(self, sent_bytes: Floats, ranks: Group) -> Floats:
        """A message of every rank to its neighbour."""
        return collectives.send_ms(sent_bytes, ranks, self.cluster)


class MeasuredRates(Rates):
    """What the ranks were measured to do, all at work at once; the cluster's figures beyond that."""

    def __init__(self, workload: Workload, cluster: Cluster, calibration: Calibration) -> None:
        super().__init__(workload, cluster)
        self._measured = calibration
        self.launch_ms = calibration.host_us / 1000
        if calibration.machine.device == "cpu":
            self.crowding = max(1.0, calibration.machine.world_size / calibration.machine.count)

    def measured(self, kind: Collective) -> bool:
        """As `Rates.measured`."""
        return kind in self._measured.collectives

    def attention_ms(self, flops: Floats, efficiency: float) -> Floats:
        """As `Rates.attention_ms`."""
        precision: Precision = "bf16" if self._precision in NARROW else self._precision
        if precision not in self._measured.gemm:
            return super().attention_ms(flops, efficiency)
        size = self._measured.gemm[precision].sizes[0][-1]
        return flops * self._measured.gemm_ms(size, size, size, precision) / (efficiency * 2 * size**3)

    def product_ms(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> tuple[Floats, Floats]:
        """As `Rates.product_ms`."""
        if self._precision not in self._measured.gemm:
            return super().product_ms(rows, out, into, matrices)
        each = rows / matrices

        def one_ms(rows: Floats | float, out: Floats | float, into: Floats | float) -> Floats:
            return matrices * self._measured.gemm_ms(rows, out, into, self._precision)

        cast, accumulated = self._beside_ms(rows * into, rows * out, matrices * out * into)
        backward = one_ms(each, into, out) + one_ms(out, into, each)
        return one_ms(each, out, into) + cast, backward + accumulated

    def moved_ms(self, moved_bytes: Floats, operations: float = 1.0) -> Floats:
        """As `Rates.moved_ms`."""
        one = self._measured.copy_ms(moved_bytes / operations) - self._measured.copy_ms(1)
        return operations * one

    def gather_ms(self, whole_bytes: Floats, ranks: Group, kind: Collective = "all_gather") -> Floats:
        """As `Rates.gather_ms`."""
        return self._within(kind, whole_bytes, ranks, super().gather_ms(whole_bytes, ranks))

    def reduce_ms(self, whole_bytes: Floats, ranks: Group) -> Floats:
        """As `Rates.reduce_ms`."""
        return self._within("all_reduce", whole_bytes, ranks, super().reduce_ms(whole_bytes, ranks))

    def exchange_ms(self, inside_bytes: Floats, across_bytes: Floats, ranks: Group) -> Floats:
        """As `Rates.exchange_ms`."""
        # The whole buffer holds the rank's own share as well, which stays.
        whole = (inside_bytes + across_bytes) * ranks.size / np.maximum(ranks.size - 1, 1)
        stated = super().exchange_ms(inside_bytes, across_bytes, ranks)
        return self._within("all_to_all", whole, ranks, stated)

    def send_ms(self, sent_bytes: Floats, ranks: Group) -> Floats:
        """As `Rates.send_ms`."""
        return self._within("send", sent_bytes, ranks, super().send_ms(sent_bytes, ranks))

    def _within(self, kind: Collective, whole_bytes: Floats, ranks: Group, stated_ms: Floats) -> Floats:
        """As measured where the group is no larger than the world that was, and inside one NVLink domain."""
        world = self._measured.machine.world_size
        if kind not in self._measured.collectives:
            return stated_ms
        size = np.minimum(ranks.size, world)
        near = self._measured.collective_ms(kind, whole_bytes, size)
        apart = self._measured.collective_ms(kind, whole_bytes, size, strided=True)
        covered = (ranks.inner == ranks.size) & (ranks.size <= world)
        return np.where(covered, np.where(ranks.stride > 1, apart, near), stated_ms)
