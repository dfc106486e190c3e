"""The kinds of work in a layer, such as products and activations, and tensor-parallel collectives: times in ms."""

from typing import Final

import numpy as np

from tuner.core.columns import Columns, Floats, Ints
from tuner.core.workload import Workload
from tuner.predict import nccl
from tuner.predict.implementation import Implementation
from tuner.predict.time.collectives import ProcessGroups, process_groups
from tuner.predict.time.passes import ModuleTime, PassTime
from tuner.predict.time.rates import Rates

USERBUFFERS_HIDE: Final = 0.7
"""Share of a tensor-parallel collective that Transformer Engine's overlap through userbuffers hides behind a matrix
product. Assumed: no figure is published."""
BESIDE_PRODUCTS: Final = 0.5
"""Share of a tensor-parallel collective that a concurrent matrix product hides without userbuffers. Assumed: both need
the same multiprocessors."""
OUT_OF_ORDER: Final = 0.5
"""Share of an overlap that is left if the number of hardware queues (cuda_device_max_connections) does not suit it, so
that kernels now and then start in another order. Assumed: no figure is published; Megatron-LM's arguments.py refuses
the combination."""


class Operations:
    """The times of the kinds of work in one layer for one micro-batch, under each of many layouts.

    Times are in milliseconds, of shape [rows]; a row is a layout.
    """

    def __init__(self, workload: Workload, rates: Rates, c: Columns, implementation: Implementation) -> None:
        self.workload, self.model, self.rates, self.layouts = workload, workload.model, rates, c
        self.implementation: Implementation = implementation
        self.tp, self.cp, self.ep, self.etp = (c[name] for name in ("tp", "cp", "ep", "etp"))
        self.tokens = c["micro_batch_size"] * workload.seq_length / self.cp
        """Number of tokens of a micro-batch on one context parallel rank."""
        self.split_tokens = self.tokens / np.where(c.on("sp"), self.tp, 1)
        """Number of tokens of a micro-batch on one rank outside the tensor-parallel modules: fewer under sequence
        parallelism."""
        self.state_bytes = rates.state_bytes
        self.tp_group = self.groups(self.tp)
        self.hides = float(rates.host_runs_ahead)
        """1 if communication can run beside computation, else 0."""
        queues = c["cuda_device_max_connections"]
        # Blackwell's queues keep the order of launches (Megatron Bridge: scripts/performance/utils/overrides.py).
        is_blackwell = "nvfp4" in rates.cluster.gpu.peak_tflops
        loses_order = (queues > 1) & np.bool_(not is_blackwell)
        self.ordered_overlap = np.where(loses_order, OUT_OF_ORDER, 1.0)
        """Factor on the time that an overlap hides if its kernels must start in launch order. It is 1 with one hardware
        queue, which preserves that order, and on Blackwell; otherwise it is OUT_OF_ORDER."""
        self.parallel_overlap = np.where(queues == 1, OUT_OF_ORDER, 1.0)
        """Factor on the time that an overlap of independent streams hides. It is 1 with several hardware queues, and
        OUT_OF_ORDER with one queue, in which the streams wait for each other."""

    def groups(self, size: Ints, stride: Ints | None = None) -> ProcessGroups:
        """Return groups of `size` ranks, whose numbers are `stride` (default 1) apart, as they lie on the cluster."""
        return process_groups(size, np.ones_like(size) if stride is None else stride, self.rates.cluster)

    def gemm(
        self, rows: Floats, out: Floats | float, into: Floats | float, matrices: Floats | float = 1.0
    ) -> ModuleTime:
        """Return the time of a matrix product in the forward pass and of its two products in the backward pass.

        The forward product is [rows, into] x [into, out]; `matrices` weights of shape [into, out] share the rows.
        """
        forward_ms, backward_ms = self.rates.product_ms(rows, out, into, matrices)
        return ModuleTime(PassTime(gemm_ms=forward_ms), PassTime(gemm_ms=backward_ms))

    def elementwise(self, passes: float, elements: Floats, fixed_ms: float = 0.0) -> ModuleTime:
        """Return the time of elementwise operations on a tensor of `elements` elements.

        Args:
            passes: How many times the forward pass reads or writes the tensor. The backward pass moves 1.5 times as
                many bytes: the gradients as often, and the saved inputs in addition.
            elements: Number of elements of the tensor.
            fixed_ms: Further time of the forward pass in ms; the backward pass takes twice as much.
        """
        moved_ms = self.rates.moved_ms(passes * elements * self.state_bytes, passes / 2)
        return ModuleTime(
            PassTime(elementwise_ms=moved_ms + fixed_ms),
            PassTime(elementwise_ms=1.5 * moved_ms + 2 * fixed_ms),
        )

    def mlp(self, rows: Floats, width: Floats | float) -> ModuleTime:
        """Return the time of an MLP of inner width `width` for `rows` tokens: both products and the activation."""
        return self.mlp_products(rows, width) + self.activation(rows, width)

    def mlp_products(self, rows: Floats, width: Floats | float, matrices: Floats | float = 1.0) -> ModuleTime:
        """Return the time of the two products of an MLP whose inner width is `width`, for `rows` tokens.

        With `matrices` above 1, as many MLPs (experts) share the tokens.
        """
        hidden, inner = self.model.hidden_size, width * (2 if self.model.gated_linear_unit else 1)
        return self.gemm(rows, inner, hidden, matrices) + self.gemm(rows, hidden, width, matrices)

    def activation(self, rows: Floats, width: Floats | float) -> ModuleTime:
        """Return the time of the activation between the two products of an MLP, for `rows` tokens of width `width`.

        Per element it reads one number, or two if the MLP is gated, and writes one.
        """
        return self.elementwise(3 if self.model.gated_linear_unit else 2, rows * width)

    def reduce_ms(self, whole_bytes: Floats, group: ProcessGroups) -> Floats:
        """Return the time in ms of an all-reduce of `whole_bytes`, which NVLink's switches compute if they can."""
        rates = self.rates
        factor = nccl.all_reduce_factor(self.layouts, group, rates.cluster, rates.measured("all_reduce"))
        return rates.reduce_ms(whole_bytes, group) * factor

    def state_collectives_ms(self) -> tuple[Floats, Floats]:
        """Return two times in ms of collectives of a micro-batch's hidden state over the tensor-parallel ranks.

        The first is an all-reduce. The second is half of what replaces it under sequence parallelism: the mean of an
        all-gather and a reduce-scatter. Both are 0 if tp is 1.
        """
        rates, group = self.rates, self.tp_group
        whole_bytes = self.tokens * self.model.hidden_size * self.state_bytes
        both_ms = rates.gather_ms(whole_bytes, group) + rates.gather_ms(whole_bytes, group, "reduce_scatter")
        several = self.tp > 1
        reduce_ms = self.reduce_ms(whole_bytes, group)
        return np.where(several, reduce_ms, 0.0), np.where(several, both_ms / 2, 0.0)

    def column_parallel_collectives(self) -> ModuleTime:
        """Return the time of the collectives of a column-parallel product that no row-parallel product follows.

        The backward pass all-reduces the gradient of the input. Under sequence parallelism the forward pass gathers the
        input, and the backward pass gathers it again and scatters its gradient.
        """
        reduce_ms, half_ms = self.state_collectives_ms()
        sp = self.layouts.on("sp")
        return ModuleTime(
            PassTime(tp_ms=np.where(sp, half_ms, 0.0)), PassTime(tp_ms=np.where(sp, 2 * half_ms, reduce_ms))
        )

    def with_tp_collectives(self, products: ModuleTime) -> ModuleTime:
        """Return the time of `products` and of the exposed tensor-parallel collectives around them.

        `products` are a column-parallel and a row-parallel product. Each pass has one all-reduce; under sequence
        parallelism it has an all-gather and a reduce-scatter.
        """
        reduce_ms, half_ms = self.state_collectives_ms()
        sp, userbuffers = self.layouts.on("sp"), self.layouts.on("tp_comm_overlap")
        pass_ms = np.where(sp, 2 * half_ms, reduce_ms)
        beside_forward_ms = np.minimum(USERBUFFERS_HIDE * pass_ms, products.forward.gemm_ms)
        forward_ms = np.where(userbuffers, pass_ms - beside_forward_ms, pass_ms)
        # In the backward pass the collective of the column-parallel product runs during the product of the weight
        # gradient (tensor_parallel/layers.py). Under sequence parallelism its input is gathered again during the
        # product of the data gradient.
        again_ms = np.where(sp, half_ms, 0.0)
        overlapping_ms = np.where(sp, half_ms + again_ms, pass_ms)
        hidden_ms = np.where(
            userbuffers,
            USERBUFFERS_HIDE * (pass_ms + again_ms),
            self.ordered_overlap * BESIDE_PRODUCTS * overlapping_ms,
        )
        beside_backward_ms = self.hides * np.minimum(hidden_ms, products.backward.gemm_ms / 2)
        backward_ms = pass_ms + again_ms - beside_backward_ms
        return products + ModuleTime(PassTime(tp_ms=forward_ms), PassTime(tp_ms=backward_ms))
