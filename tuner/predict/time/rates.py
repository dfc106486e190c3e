"""How fast the ranks do one piece of work (a product, a copy, a collective, a launch), in milliseconds.

`Rates` computes times from the figures that the cluster states. `MeasuredRates` computes them from a calibration of the
machine, and uses the cluster's figures for what was not measured.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Floats
from tuner.core.workload import Precision, Workload
from tuner.errors import InputError
from tuner.predict.calibration import Calibration, Collective
from tuner.predict.time import collectives
from tuner.predict.time.collectives import ProcessGroups

GEMM_EFFICIENCY: Final = 0.75
"""Share of the dense peak that a large matrix product reaches. Assumed, somewhat below the published rates of the best
shapes: 0.86 on A100 SXM, 0.80 on H100 SXM, 0.78 on B200 (github.com/stas00/ml-engineering, compute/accelerator, maximum
achievable matmul FLOPS)."""
MEMORY_EFFICIENCY: Final = 0.8
"""Share of the memory's stated rate that elementwise kernels reach. Assumed, at the lower end of the 0.8 to 0.9 that
large copies reach."""
TILE_ROWS: Final = 128
"""Rows of an output tile of a cuBLAS kernel. On average the last tile of each expert is half empty. Assumed: cuBLAS has
kernels with other tiles too."""
KERNEL_MS: Final = 3e-3
"""Time in ms per kernel during which the GPU is not full, since the kernel starts or ends. Assumed."""
LAUNCH_MS: Final = 0.011
"""Time in ms that the host needs for one operation in eager PyTorch, averaged over kernel launches and views, if no
calibration measured it. Chosen between 5 and 20 us to suit vTrain's published step times on A100s, which `python -m
tests.bench.replay` compares with the predictions."""
FLEX_EFFICIENCY: Final = 0.9
"""Share of a link's rate that DeepEP's dispatch and combine reach. Published for its normal kernels on H800 (README of
deepseek-ai/DeepEP): 153 to 158 of NVLink's 160 GB/s, 43 to 47 of the network's 50 GB/s."""

OPERAND_BYTES: Final[Mapping[Precision, float]] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "mxfp8": 1.0,
    "nvfp4": 0.5,
}
"""Bytes per element of the operands that a matrix product reads, by precision."""
NARROW: Final = ("fp8", "mxfp8", "nvfp4")
"""Precisions in which only matrix products are computed; all other work is in bf16."""


class Rates:
    """How fast the ranks are by the cluster's stated figures. Methods whose names end in `_ms` return times in ms.

    Arguments and results are arrays that broadcast, with one value per layout.

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
        self.state_bytes = float(workload.weight_bytes)
        """Bytes of one element of an activation."""
        self.gradient_bytes = float(workload.gradient_bytes)
        """Bytes of the gradient of one weight, as it is accumulated and reduced."""
        self.parameter_bytes = 1.0 if workload.fp8_param else self.state_bytes
        """Bytes of one weight, as the distributed optimizer gathers it."""
        self._operand_bytes = OPERAND_BYTES[workload.precision]
        self._bytes_per_ms = MEMORY_EFFICIENCY * cluster.gpu.memory_bandwidth_gb_per_s * 1e6
        self._flops_per_ms = GEMM_EFFICIENCY * peaks[workload.precision] * 1e9
        # In the narrow precisions attention computes in 16 bits.
        narrow = workload.precision in NARROW and "bf16" in peaks
        self._attention_peak_tflops = peaks["bf16"] if narrow else peaks[workload.precision]
        self.host_runs_ahead = cluster.device == "cuda"
        """Whether the host launches work while the device still computes. On CPU each operation ends before the next
        starts."""
        self.kernel_ms = KERNEL_MS if self.host_runs_ahead else 0.0
        """Time in ms per kernel during which the GPU is not full, since the kernel starts or ends; 0 on CPU."""
        self.ranks_per_core = max(1.0, cluster.gpus_per_node / (cluster.cores or cluster.gpus_per_node))
        """Number of ranks that share one core, at least 1. A rank that waits leaves its share of the core to the
        others."""
        self.launch_ms = LAUNCH_MS * self.ranks_per_core
        """Time in ms that the host needs for one operation."""

    def attention_ms(self, flops: Floats, efficiency: float) -> Floats:
        """Return the time in ms of attention with `flops` FLOPs.

        Its rate is `efficiency` times the rate of large matrix products.
        """
        return flops / (efficiency * GEMM_EFFICIENCY * self._attention_peak_tflops * 1e9)

    def fp32_ms(self, flops: Floats) -> Floats:
        """Return the time in ms of a matrix product that is computed in fp32, whatever the workload's precision."""
        peaks = self.cluster.gpu.peak_tflops
        return flops / (GEMM_EFFICIENCY * peaks.get("fp32", peaks[self._precision]) * 1e9)

    def product_ms(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> tuple[Floats, Floats]:
        """Return the time in ms of a product in the forward pass, and of its two products in the backward pass.

        The forward product is [rows, into] x [into, out]. `matrices` weights of shape [into, out] share the rows.

        The time is the sum of the FLOPs at the rate of large products and of the bytes at the memory's rate: a kernel's
        prologue and epilogue do not hide in its main loop. Thin shapes are therefore slow without further constants.
        """
        padded_rows = rows + np.where(np.asarray(matrices) > 1, matrices * (TILE_ROWS / 2), 0.0)
        flops_ms = 2 * padded_rows * out * into / self._flops_per_ms
        weights = matrices * out * into
        read, written = self._operand_bytes, self.state_bytes
        forward_bytes = read * (rows * into + weights) + written * rows * out
        backward_bytes = read * (2 * rows * out + rows * into + weights) + written * rows * into
        forward_extra_ms, backward_extra_ms = self._beside_products_ms(rows * into, rows * out, weights)
        return (
            flops_ms + forward_bytes / self._bytes_per_ms + forward_extra_ms,
            2 * flops_ms + backward_bytes / self._bytes_per_ms + backward_extra_ms,
        )

    def _beside_products_ms(
        self, inputs: Floats, outputs: Floats, weights: Floats | float
    ) -> tuple[Floats, Floats]:
        """Return the time in ms, forward and backward, of the elementwise work that comes with matrix products.

        `inputs`, `outputs` and `weights` are numbers of elements. To become an operand in a narrow precision, a tensor
        is read in the wide precision and written twice in the narrow one, as it is and transposed. The backward pass
        also adds the gradients of the weights to the accumulated gradients.
        """
        narrow = self._operand_bytes < self.state_bytes
        cast_bytes = (self.state_bytes + 2 * self._operand_bytes) if narrow else 0.0
        accumulated_bytes = 2 * self.gradient_bytes * weights
        return self.moved_ms(cast_bytes * inputs), self.moved_ms(cast_bytes * outputs + accumulated_bytes)

    def moved_ms(self, moved_bytes: Floats, operations: float = 1.0) -> Floats:
        """Return the time in ms of elementwise operations without their launches.

        `moved_bytes` are the bytes that all `operations` operations together read and write.
        """
        return moved_bytes / self._bytes_per_ms

    def gather_ms(self, whole_bytes: Floats, group: ProcessGroups, kind: Collective = "all_gather") -> Floats:
        """Return the time in ms of an all-gather or a reduce-scatter, as `kind` says.

        `whole_bytes` are the bytes of the buffer that the all-gather fills, or that the reduce-scatter reads, on each
        rank.
        """
        return collectives.gather_ms(whole_bytes, group, self.cluster)

    def reduce_ms(self, whole_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms of an all-reduce of `whole_bytes`: a reduce-scatter and an all-gather."""
        return 2 * collectives.gather_ms(whole_bytes, group, self.cluster)

    def measured(self, kind: Collective) -> bool:
        """Return whether the times of this kind of collective are measured; here they are not."""
        return False

    def exchange_ms(self, inside_bytes: Floats, across_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms of an all-to-all.

        Each rank sends `inside_bytes` within its NVLink domain and `across_bytes` out of it.
        """
        return collectives.exchange_ms(inside_bytes, across_bytes, group, self.cluster)

    def send_ms(self, sent_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms in which every rank sends one message of `sent_bytes` to its neighbour."""
        return collectives.send_ms(sent_bytes, group, self.cluster)


class MeasuredRates(Rates):
    """How fast the ranks were measured to be while all of them worked at the same time: times in ms.

    For what was not measured, the times follow from the cluster's stated figures.
    """

    def __init__(self, workload: Workload, cluster: Cluster, calibration: Calibration) -> None:
        super().__init__(workload, cluster)
        self._calibration = calibration
        self.launch_ms = calibration.host_us / 1000
        if calibration.machine.device == "cpu":
            self.ranks_per_core = max(1.0, calibration.machine.world_size / calibration.machine.count)

    def measured(self, kind: Collective) -> bool:
        """Return whether the calibration has times of this kind of collective."""
        return kind in self._calibration.collectives

    def attention_ms(self, flops: Floats, efficiency: float) -> Floats:
        """Return the time in ms of attention with `flops` FLOPs.

        Its rate is `efficiency` times the rate of the largest measured product. If no product was measured in the
        precision of attention, the rate follows from the cluster's stated figures.
        """
        precision: Precision = "bf16" if self._precision in NARROW else self._precision
        if precision not in self._calibration.gemm:
            return super().attention_ms(flops, efficiency)
        size = self._calibration.gemm[precision].sizes[0][-1]
        largest_ms = self._calibration.gemm_ms(size, size, size, precision)
        return flops * largest_ms / (efficiency * 2 * size**3)

    def product_ms(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> tuple[Floats, Floats]:
        """Return the time in ms of a product in the forward pass, and of its two products in the backward pass.

        The time is measured if the calibration has products in the workload's precision. Otherwise it follows from the
        cluster's stated figures. The forward product is [rows, into] x [into, out]. `matrices` weights of shape [into,
        out] share the rows, and each has a product of its own.
        """
        if self._precision not in self._calibration.gemm:
            return super().product_ms(rows, out, into, matrices)
        rows_each = rows / matrices

        def products_ms(rows: Floats | float, out: Floats | float, into: Floats | float) -> Floats:
            return matrices * self._calibration.gemm_ms(rows, out, into, self._precision)

        forward_extra_ms, backward_extra_ms = self._beside_products_ms(
            rows * into, rows * out, matrices * out * into
        )
        backward_ms = products_ms(rows_each, into, out) + products_ms(out, into, rows_each)
        return products_ms(rows_each, out, into) + forward_extra_ms, backward_ms + backward_extra_ms

    def moved_ms(self, moved_bytes: Floats, operations: float = 1.0) -> Floats:
        """Return the measured time in ms of elementwise operations without their launches.

        `moved_bytes` are the bytes that all `operations` operations together read and write.
        """
        launch_ms = self._calibration.copy_ms(1)
        return operations * (self._calibration.copy_ms(moved_bytes / operations) - launch_ms)

    def gather_ms(self, whole_bytes: Floats, group: ProcessGroups, kind: Collective = "all_gather") -> Floats:
        """Return the time in ms of an all-gather or a reduce-scatter, as `kind` says.

        `whole_bytes` are the bytes of the buffer that the all-gather fills, or that the reduce-scatter reads, on each
        rank. The time follows from the cluster's stated figures if the calibration does not cover the group.
        """
        return self._measured_or(super().gather_ms(whole_bytes, group), kind, whole_bytes, group)

    def reduce_ms(self, whole_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms of an all-reduce of `whole_bytes`.

        The time follows from the cluster's stated figures if the calibration does not cover the group.
        """
        return self._measured_or(super().reduce_ms(whole_bytes, group), "all_reduce", whole_bytes, group)

    def exchange_ms(self, inside_bytes: Floats, across_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms of an all-to-all.

        Each rank sends `inside_bytes` within its NVLink domain and `across_bytes` out of it. The time follows from the
        cluster's stated figures if the calibration does not cover the group.
        """
        # The whole buffer also holds the part that stays on the rank.
        whole_bytes = (inside_bytes + across_bytes) * group.size / np.maximum(group.size - 1, 1)
        stated_ms = super().exchange_ms(inside_bytes, across_bytes, group)
        return self._measured_or(stated_ms, "all_to_all", whole_bytes, group)

    def send_ms(self, sent_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms in which every rank sends one message of `sent_bytes` to its neighbour.

        The time follows from the cluster's stated figures if the calibration does not cover the group.
        """
        return self._measured_or(super().send_ms(sent_bytes, group), "send", sent_bytes, group)

    def _measured_or(
        self, stated_ms: Floats, kind: Collective, whole_bytes: Floats, group: ProcessGroups
    ) -> Floats:
        """Return the measured time in ms of a collective, or `stated_ms` in rows that the measurement does not cover.

        A measurement covers groups inside one NVLink domain that are no larger than the measured world.
        """
        world = self._calibration.machine.world_size
        if kind not in self._calibration.collectives:
            return stated_ms
        size = np.minimum(group.size, world)
        neighbours_ms = self._calibration.collective_ms(kind, whole_bytes, size)
        strided_ms = self._calibration.collective_ms(kind, whole_bytes, size, strided=True)
        covered = (group.ranks_per_domain == group.size) & (group.size <= world)
        return np.where(covered, np.where(group.stride > 1, strided_ms, neighbours_ms), stated_ms)
