"""Time in ms that context parallelism adds to a layer's attention: exchanges that attention does not hide.

Ranks exchange keys and values, or heads, as the knob `cp_comm_type` says.
"""

from typing import Final

import numpy as np

from tuner.core.columns import Columns, Floats
from tuner.core.workload import Model
from tuner.predict.time.collectives import process_groups
from tuner.predict.time.rates import Rates

RING_KERNELS: Final = 8
"""Kernels that one step of ring attention launches in addition to those that move its data. Assumed."""
GATHERED_STEPS: Final = 2
"""Number of steps in which attention processes gathered keys and values: the two halves of the sequence. A ring takes
one step per context rank. Counted in Transformer Engine's AttnFuncWithCPAndKVAllGather (context_parallel.py)."""
RING_FORWARD_PASSES: Final = 5
"""Reads and writes that one step of ring attention adds in the forward pass, in multiples of the size of attention's
output: the step adds its output (16 bits) to the sum of all outputs (32 bits). Counted in Transformer Engine's
AttnFuncWithCPAndKVP2P (context_parallel.py)."""
RING_BACKWARD_PASSES: Final = 6
"""Reads and writes that one step of ring attention adds in the backward pass, in multiples of the size of attention's
output: the step adds the gradients of queries, keys and values to their sums. Counted in Transformer Engine's
AttnFuncWithCPAndKVP2P (context_parallel.py)."""


def attention_step_kernels(c: Columns) -> Floats:
    """Return how many more kernels a layer launches for attention with context parallelism than without it.

    The result has shape [rows] and is 0 if cp is 1.
    """
    steps = np.where(c.among("cp_comm_type", "p2p"), c["cp"], GATHERED_STEPS)
    return np.where(c["cp"] > 1, steps * float(RING_KERNELS), 0.0)


class ContextExchange:
    """The time of the exchange between context parallel ranks in one layer's attention, for one micro-batch.

    Each method returns the milliseconds of the forward and of the backward pass, each of shape [rows]. The result has
    no meaning in rows with cp 1.

    Args:
        model: The model.
        rates: How fast the cluster's ranks are.
        c: The layouts.
        tokens: Number of tokens of the micro-batch on one context parallel rank, shape [rows].
    """

    def __init__(self, model: Model, rates: Rates, c: Columns, tokens: Floats) -> None:
        self._model, self._rates, self._c, self._tokens = model, rates, c, tokens
        self._tp, self._cp = c["tp"], c["cp"]
        self._group = process_groups(self._cp, self._tp, rates.cluster)

    def exposed_ms(
        self, attention_forward_ms: Floats, attention_backward_ms: Floats
    ) -> tuple[Floats, Floats]:
        """Return the exposed time in ms of the exchange, forward and backward, by the method that `cp_comm_type` names.

        It is the part of the exchange that attention, whose times are the arguments, does not hide.
        """
        ring = self._ring_ms(attention_forward_ms, attention_backward_ms)
        if self._c.among("cp_comm_type", "p2p").all():
            return ring
        gathered, heads = self.gathered_ms(gathers_again=True), self._heads_ms()
        all_gather, a2a = (self._c.among("cp_comm_type", kind) for kind in ("all_gather", "a2a"))
        return (
            np.where(all_gather, gathered[0], np.where(a2a, heads[0], ring[0])),
            np.where(all_gather, gathered[1], np.where(a2a, heads[1], ring[1])),
        )

    def gathered_ms(self, gathers_again: bool) -> tuple[Floats, Floats]:
        """Return the time in ms to gather keys and values from the context ranks, and to scatter their gradients.

        The first array is for the forward pass, the second for the backward pass. Keys and values are gathered one
        after the other, and nothing hides this time. `gathers_again` says whether the backward pass gathers them again,
        as it does in Transformer Engine (context_parallel.py, AttnFuncWithCPAndKVAllGather).
        """
        whole_bytes = self._tokens * self._cp * self._key_value_width / 2 / self._tp * self._rates.state_bytes
        gathered = 2 * self._rates.gather_ms(whole_bytes, self._group)
        scattered = 2 * self._rates.gather_ms(whole_bytes, self._group, "reduce_scatter")
        return gathered, scattered + gathered * gathers_again

    def _ring_ms(self, attention_forward_ms: Floats, attention_backward_ms: Floats) -> tuple[Floats, Floats]:
        """Return the time in ms that ring attention adds to the forward and to the backward pass.

        Keys and values travel around the ring while attention computes. In the backward pass their gradients travel
        too.
        """
        return (
            self._ring_pass_ms(1, attention_forward_ms, RING_FORWARD_PASSES),
            self._ring_pass_ms(2, attention_backward_ms, RING_BACKWARD_PASSES),
        )

    def _ring_pass_ms(self, trips: int, attention_ms: Floats, sum_passes: int) -> Floats:
        """Return the time in ms that the ring adds to one pass: the travel that attention does not hide, and additions.

        The additions sum up the results of the steps.

        Args:
            trips: How many times data of the size of keys and values go around the ring.
            attention_ms: Time of the attention that runs meanwhile.
            sum_passes: Reads and writes that each step adds, in multiples of the size of attention's output.
        """
        steps, rates = self._cp - 1, self._rates
        sent_bytes = self._tokens * self._key_value_width / self._tp * rates.state_bytes
        output_bytes = self._tokens * self._output_width / self._tp * rates.state_bytes
        travel_ms = steps * rates.send_ms(trips * sent_bytes, self._group)
        sum_ms = self._cp * (rates.moved_ms(sum_passes * output_bytes) + RING_KERNELS * rates.kernel_ms)
        return np.maximum(travel_ms - attention_ms * steps / self._cp, 0.0) + sum_ms

    def _heads_ms(self) -> tuple[Floats, Floats]:
        """Return the time in ms to exchange tokens for heads in each pass, which nothing hides.

        An all-to-all sends queries, keys and values to the ranks that compute their heads, and the output comes back.
        In the backward pass their gradients take the opposite ways (Transformer Engine: context_parallel.py,
        AttnFuncWithCPAndQKVOA2A).
        """
        both_ways = self._exchange_ms(self._query_width + self._key_value_width)
        both_ways = both_ways + self._exchange_ms(self._output_width)
        return both_ways, both_ways

    def _exchange_ms(self, width: float) -> Floats:
        """Return the time in ms of an all-to-all of `width` elements per token; shape [rows]."""
        group = self._group
        sent = self._tokens * width / self._tp * self._rates.state_bytes
        inside = sent * (group.ranks_per_domain - 1) / group.size
        return self._rates.exchange_ms(
            inside, sent * (group.size - group.ranks_per_domain) / group.size, group
        )

    @property
    def _key_value_width(self) -> float:
        """Return the number of elements of one token's keys and values together."""
        model = self._model
        if not model.multi_latent_attention:
            return 2 * model.num_query_groups * model.kv_channels
        widths = (model.qk_head_dim, model.qk_pos_emb_head_dim, model.v_head_dim)
        return model.num_attention_heads * sum(width or 0 for width in widths)

    @property
    def _query_width(self) -> int:
        """Return the number of elements of one token's queries."""
        model = self._model
        if not model.multi_latent_attention:
            return model.num_attention_heads * model.kv_channels
        return model.num_attention_heads * ((model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0))

    @property
    def _output_width(self) -> int:
        """Return the number of elements of one token's attention output."""
        model = self._model
        width = (model.v_head_dim or 0) if model.multi_latent_attention else model.kv_channels
        return model.num_attention_heads * width
