"""The time of one layer's experts for one micro-batch, in milliseconds, for many layouts at once."""

from typing import Final

import numpy as np

from tuner.core.columns import Bools, Floats
from tuner.predict.routing import load_of_busiest
from tuner.predict.time.collectives import FABRIC_EFFICIENCY, NVLINK_EFFICIENCY, ProcessGroups
from tuner.predict.time.operations import Operations
from tuner.predict.time.passes import ModuleTime, PassTime
from tuner.predict.time.rates import FLEX_EFFICIENCY

PERMUTE_PASSES: Final = 8
"""Reads and writes of a dispatched token: for the permute, the sort by expert, and the reverse of both. Counted in
Megatron-Core's moe/token_dispatcher.py."""
FLEX_PERMUTE_PASSES: Final = 4
"""Reads and writes of a dispatched token under the flex dispatcher: for one permute of the tokens that arrived, and its
reverse. Counted in Megatron-Core's moe/token_dispatcher.py (_DeepepManager); HybridEP permutes in one call with the
dispatch (csrc/hybrid_ep/extension/permute.cu)."""
BIAS_FORWARD_PASSES: Final = 14
"""Reads and writes of a dispatched token for the bias of its experts in the forward pass: multiply, add, concatenate,
round. Counted in Megatron-Core's experts.py (_apply_bias)."""
BIAS_BACKWARD_PASSES: Final = 18
"""Reads and writes of a dispatched token for the bias of its experts in the backward pass. Counted in
Megatron-Core's experts.py (_apply_bias)."""
CAST_PASSES: Final = 3
"""Reads and writes of a token, of 16 bits each, by which the router casts it to fp32. Counted: one read, and one write
of twice the width."""
DEEPEP_NVLINK_RANKS: Final = 8
"""Number of ranks that DeepEP reaches over NVLink, however large the NVLink domain. Published: deepseek-ai/DeepEP,
csrc/kernels/configs.cuh, NUM_MAX_NVL_PEERS."""
EXPERT_OVERLAP: Final = 0.8
"""Share of the time of a layer's matrix products during which the tokens of another micro-batch can be sent. Assumed:
no figure is published."""
DELAYED_OVERLAP: Final = 0.9
"""The value in place of `EXPERT_OVERLAP` in the backward pass if weight gradients, which are half of its products, are
delayed (delay_wgrad_compute). Assumed: the delayed products run during communication beside which nothing else is left
to run (model_chunk_schedule_plan.py), which halves the share that EXPERT_OVERLAP lacks."""


def expert_modules(operations: Operations) -> dict[str, ModuleTime]:
    """Return the time of a layer's experts by module, with the names that selective recomputation uses.

    "moe_act" is the activation, "shared_experts" the shared expert if there is one, and "moe" all the rest: router,
    permutes, products and the communication that no computation hides.
    """
    ops, model = operations, operations.model
    width = (model.moe_ffn_hidden_size or 0) / ops.etp
    busiest = _busiest_load(ops)
    routed_tokens = ops.split_tokens * (model.moe_router_topk or 0) * busiest
    rows = routed_tokens * ops.etp
    expert_products = ops.mlp_products(rows, width, (model.num_moe_experts or 0) / ops.ep)
    if model.add_bias_linear:
        expert_products += _weighted_bias(ops, routed_tokens)
    modules = {"moe_act": ops.activation(rows, width)}
    shared_gemm_ms: Floats | float = 0.0
    if model.moe_shared_expert_intermediate_size:
        shared_mlp = ops.mlp(ops.tokens, model.moe_shared_expert_intermediate_size / ops.tp)
        modules["shared_experts"] = ops.with_tp_collectives(shared_mlp)
        shared_gemm_ms = shared_mlp.forward.gemm_ms
    permutes = _permutes(ops, routed_tokens * model.hidden_size)
    work = _router(ops) + expert_products + permutes
    dispatch_ms = _dispatch_ms(ops, ops.split_tokens * busiest)
    modules["moe"] = work + _exposed_dispatch(ops, work, dispatch_ms, shared_gemm_ms)
    return modules


def _exposed_dispatch(
    ops: Operations, work: ModuleTime, dispatch_ms: Floats, shared_gemm_ms: Floats | float
) -> ModuleTime:
    """Return the exposed time of sending tokens to their experts and back: the part that no computation hides.

    With overlap_moe_expert_parallel_comm, the products of another micro-batch hide the communication; otherwise, with
    moe_shared_expert_overlap, the products of the shared expert do.

    Args:
        ops: The kinds of work of a layer.
        work: Time of router, permutes and routed experts.
        dispatch_ms: Time to send the tokens to their experts and back once, in ms.
        shared_gemm_ms: Time of the shared expert's products in the forward pass, in ms.
    """
    across = ops.layouts.on("overlap_moe_expert_parallel_comm")
    beside_shared_ms = np.where(ops.layouts.on("moe_shared_expert_overlap"), shared_gemm_ms, 0.0)
    delayed = np.where(ops.layouts.on("delay_wgrad_compute"), DELAYED_OVERLAP, EXPERT_OVERLAP)
    counts_ms, weights_ms = _notices_ms(ops)

    def exposed_ms(across_ms: Floats | float, shared_ms: Floats | float, notices_ms: Floats) -> Floats:
        hidden_ms = ops.hides * ops.parallel_overlap * np.where(across, across_ms, shared_ms)
        return np.maximum(dispatch_ms + notices_ms - hidden_ms, 0.0)

    forward_ms = exposed_ms(EXPERT_OVERLAP * work.forward.gemm_ms, beside_shared_ms, counts_ms + weights_ms)
    backward_ms = exposed_ms(delayed * work.backward.gemm_ms, 2 * beside_shared_ms, weights_ms)
    return ModuleTime(PassTime(ep_ms=forward_ms), PassTime(ep_ms=backward_ms))


def _is_flex(ops: Operations) -> Bools:
    """Return a mask of the layouts with the flex dispatcher; shape [rows]."""
    return ops.layouts.among("moe_token_dispatcher_type", "flex")


def _permutes(ops: Operations, elements: Floats) -> ModuleTime:
    """Return the time to bring tokens, of `elements` elements in all, into the order of the experts and back."""
    permutes, flex = ops.elementwise(PERMUTE_PASSES, elements), _is_flex(ops)
    if not flex.any():
        return permutes
    return permutes.times(np.where(flex, FLEX_PERMUTE_PASSES / PERMUTE_PASSES, 1.0))


def _busiest_load(ops: Operations) -> Floats:
    """Return the tokens of the busiest rank in a layer, divided by the mean of its expert parallel group; shape [rows].

    The other ranks of the group wait for this rank. If ranks share cores, they go on with other work and the result is
    1.
    """
    load = load_of_busiest(ops.layouts, ops.workload)
    layers = np.maximum(sum(ops.model.moe_layer_pattern()) / ops.layouts["pp"], 1)
    in_one_layer: Floats = np.minimum(1 + (load.kept - 1) * np.sqrt(layers), load.worst)
    return in_one_layer if ops.rates.ranks_per_core == 1 else np.ones_like(in_one_layer)


def _router(ops: Operations) -> ModuleTime:
    """Return the time of the router, which casts the hidden state to fp32 and computes every expert's score in fp32."""
    hidden, tokens = ops.model.hidden_size, ops.split_tokens
    scores_ms = ops.rates.fp32_ms(2 * tokens * hidden * (ops.model.num_moe_experts or 0))
    cast = ops.elementwise(CAST_PASSES, tokens * hidden)
    return cast + ModuleTime(PassTime(gemm_ms=scores_ms), PassTime(gemm_ms=2 * scores_ms))


def _weighted_bias(ops: Operations, routed_tokens: Floats) -> ModuleTime:
    """Return the time to add the experts' biases, each times its token's routing weight and therefore in fp32."""
    moved_bytes = routed_tokens * ops.model.hidden_size * ops.state_bytes
    return ModuleTime(
        PassTime(elementwise_ms=ops.rates.moved_ms(BIAS_FORWARD_PASSES * moved_bytes)),
        PassTime(elementwise_ms=ops.rates.moved_ms(BIAS_BACKWARD_PASSES * moved_bytes)),
    )


def _notices_ms(ops: Operations) -> tuple[Floats, Floats]:
    """Return the latencies in ms of two small messages that the alltoall dispatcher sends; 0 for other dispatchers.

    The first message says how many tokens go to each rank; the second has the routing weights of the tokens.
    """
    expert_group, no_bytes = ops.groups(ops.ep, ops.etp), np.zeros(ops.ep.shape)
    needed = (ops.ep > 1) & ops.layouts.among("moe_token_dispatcher_type", "alltoall")
    counts_ms = ops.rates.gather_ms(no_bytes, ops.groups(ops.ep * ops.etp))
    weights_ms = ops.rates.exchange_ms(no_bytes, no_bytes, expert_group)
    return np.where(needed, counts_ms, 0.0), np.where(needed, weights_ms, 0.0)


def _dispatch_ms(ops: Operations, tokens: Floats) -> Floats:
    """Return the time in ms to send tokens to their experts and back, once; shape [rows].

    `tokens` is the number of tokens on a rank before the dispatch.
    """
    rates, topk = ops.rates, ops.model.moe_router_topk or 0
    token_bytes = ops.model.hidden_size * ops.state_bytes
    expert_group, whole_group = ops.groups(ops.ep, ops.etp), ops.groups(ops.ep * ops.etp)

    def there_and_back_ms(whole_bytes: Floats, group: ProcessGroups) -> Floats:
        return rates.gather_ms(whole_bytes, group) + rates.gather_ms(whole_bytes, group, "reduce_scatter")

    allgather_ms = there_and_back_ms(tokens * token_bytes * whole_group.size, whole_group)
    over_etp_ms = there_and_back_ms(tokens * topk * token_bytes * ops.etp, ops.groups(ops.etp))
    over_ep_ms = 2 * _exchange_ms(ops, tokens * token_bytes, expert_group, topk)
    exchange_ms = np.where(ops.ep > 1, over_ep_ms, 0.0) + np.where(ops.etp > 1, over_etp_ms, 0.0)
    gathers = ops.layouts.among("moe_token_dispatcher_type", "allgather")
    return np.where(whole_group.size > 1, np.where(gathers, allgather_ms, exchange_ms), 0.0)


def _exchange_ms(ops: Operations, sent_bytes: Floats, group: ProcessGroups, topk: int) -> Floats:
    """Return the time in ms to send tokens one way to the ranks of their experts; shape [rows].

    `sent_bytes` are the bytes of all tokens of a rank, each counted once. The alltoall dispatcher sends one copy of a
    token per expert. The flex dispatcher (DeepEP, HybridEP) sends one copy per rank, and the ranks of another NVLink
    domain share one copy on the way there.
    """
    flex = _is_flex(ops)
    deepep = flex & ops.layouts.among("moe_flex_dispatcher_backend", "deepep")
    deepep_ranks = np.minimum(group.ranks_per_domain, DEEPEP_NVLINK_RANKS)
    near_ranks = np.where(deepep, deepep_ranks, group.ranks_per_domain)
    group = ProcessGroups(group.size, group.stride, near_ranks)
    # These are the expected numbers of other ranks, and of other domains, that hold at least one of a token's experts.
    flex_ranks = (group.size - 1) * (1 - (1 - 1 / group.size) ** topk)
    flex_domains = (group.domains - 1) * (1 - (1 - 1 / group.domains) ** topk)
    flex_inside = flex_ranks * NVLINK_EFFICIENCY / FLEX_EFFICIENCY
    flex_across = flex_domains * FABRIC_EFFICIENCY / FLEX_EFFICIENCY
    inside = np.where(flex, flex_inside, topk * (group.ranks_per_domain - 1) / group.size)
    across = np.where(flex, flex_across, topk * (group.size - group.ranks_per_domain) / group.size)
    return ops.rates.exchange_ms(sent_bytes * inside, sent_bytes * across, group)
