"""Attention over context ranks: what keys, values and heads on their way take that nothing hides. Milliseconds."""

from typing import Final

import numpy as np

from tuner.core.columns import Columns
from tuner.core.workload import Model
from tuner.predict.time.collectives import Floats, group
from tuner.predict.time.rates import Rates

RING_KERNELS: Final = 8
"""Kernels of one step of ring attention beside those that move its data."""
GATHERED_STEPS: Final = 2
"""Passes over the sequence in which attention takes gathered keys and values: its halves; a ring takes one a rank."""
RING_PASSES: Final = (5, 6)
"""Reads and writes of the queries' width a step of ring attention adds, forward and backward: a step's output, in
16 bits, to the sum, in 32; backward the queries' gradient to its sum, the keys' and values' too (Transformer
Engine: context_parallel.py, AttnFuncWithCPAndKVP2P)."""


def kernels(c: Columns) -> Floats:
    """Kernels of a layer's attention over context ranks beside those of attention alone."""
    steps = np.where(c.among("cp_comm_type", "p2p"), c["cp"], GATHERED_STEPS)
    return np.where(c["cp"] > 1, steps * float(RING_KERNELS), 0.0)


class ContextRanks:
    """The ranks that share a micro-batch's tokens, of which each has `tokens`."""

    def __init__(self, model: Model, rates: Rates, c: Columns, tokens: Floats) -> None:
        self._model, self._rates, self._c, self._tokens = model, rates, c, tokens
        self._tp, self._cp = c["tp"], c["cp"]
        self._ranks = group(self._cp, self._tp, rates.cluster)

    def exposed_ms(self, forward: Floats, backward: Floats) -> tuple[Floats, Floats]:
        """Forward and backward, beside attention of so many ms, by `cp_comm_type`; of a lone rank without meaning."""
        travel, back = self._ring_ms(forward, backward)
        if self._c.among("cp_comm_type", "p2p").all():
            return travel, back
        gathered, exchanged = self.gathered_ms(again=True), self._heads_ms()
        all_gather, a2a = (self._c.among("cp_comm_type", kind) for kind in ("all_gather", "a2a"))
        return (
            np.where(all_gather, gathered[0], np.where(a2a, exchanged[0], travel)),
            np.where(all_gather, gathered[1], np.where(a2a, exchanged[1], back)),
        )

    @property
    def _key_value(self) -> float:
        """Of keys and values together."""
        model = self._model
        if not model.multi_latent_attention:
            return 2 * model.num_query_groups * model.kv_channels
        widths = (model.qk_head_dim, model.qk_pos_emb_head_dim, model.v_head_dim)
        return model.num_attention_heads * sum(width or 0 for width in widths)

    @property
    def _output(self) -> int:
        model = self._model
        return model.num_attention_heads * (
            (model.v_head_dim or 0) if model.multi_latent_attention else model.kv_channels
        )

    def _ring_ms(self, forward: Floats, backward: Floats) -> tuple[Floats, Floats]:
        """Keys and values around the context ranks, and backward their gradients, beside the attention."""
        steps, rates = self._cp - 1, self._rates
        sent = self._tokens * self._key_value / self._tp * self._rates.state_bytes
        passed = self._tokens * self._output / self._tp * self._rates.state_bytes
        ring = self._ranks
        exposed = []
        for trips, beside, passes in ((1, forward, RING_PASSES[0]), (2, backward, RING_PASSES[1])):
            travel = steps * rates.send_ms(trips * sent, ring)
            summed = self._cp * (rates.moved_ms(passes * passed) + RING_KERNELS * rates.kernel_ms)
            exposed.append(np.maximum(travel - beside * steps / self._cp, 0.0) + summed)
        return exposed[0], exposed[1]

    def gathered_ms(self, again: bool) -> tuple[Floats, Floats]:
        """Keys and values gathered from the context ranks, one after the other, and their gradients scattered.

        Transformer Engine gathers them `again` backward (context_parallel.py, AttnFuncWithCPAndKVAllGather).
        """
        whole = self._tokens * self._cp * self._key_value / 2 / self._tp * self._rates.state_bytes
        ranks = self._ranks
        gathered = 2 * self._rates.gather_ms(whole, ranks)
        scattered = 2 * self._rates.gather_ms(whole, ranks, "reduce_scatter")
        return gathered, scattered + gathered * again

    def _heads_ms(self) -> tuple[Floats, Floats]:
        """Heads instead of tokens: queries, keys and values to the ranks of their heads, the output back, and backward
        their gradients (context_parallel.py, AttnFuncWithCPAndQKVOA2A); nothing hides it.
        """
        ranks = self._ranks

        def once(width: float) -> Floats:
            sent = self._tokens * width / self._tp * self._rates.state_bytes
            inside = sent * (ranks.inner - 1) / ranks.size
            return self._rates.exchange_ms(inside, sent * (ranks.size - ranks.inner) / ranks.size, ranks)

        model = self._model
        query = self._output
        if model.multi_latent_attention:
            query = model.num_attention_heads * ((model.qk_head_dim or 0) + (model.qk_pos_emb_head_dim or 0))
        both = once(query + self._key_value) + once(self._output)
        return both, both
