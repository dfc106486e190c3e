"""Bytes of the MLP, dense or with experts, of one layer and one micro-batch.

The bytes are those that autograd saves, and those that the passes allocate beside them. The numbers follow the source
files that tuner/predict/memory/share.py names.
"""

import numpy as np

from tuner.core.columns import Bools, Floats
from tuner.core.parameters import expert
from tuner.predict.memory.share import HalfLayer, RankShare


def dense_mlp(share: RankShare) -> HalfLayer:
    """Return the bytes of the residual sum after attention, of its norm, and of the dense MLP that follows."""
    tokens_per_rank, hidden = share.tokens / share.tp, share.model.hidden_size
    width = tokens_per_rank * share.model.ffn_hidden_size
    inner, backward = _projections(share, width, hidden * share.model.ffn_hidden_size / share.tp)
    norm = share.norm(share.hidden)
    # Transformer Engine's MLP module contains the norm. With Torch, the norm is a module in front of the MLP.
    modules = [("mlp", inner + norm)] if share.fused else [("mlp", inner), ("layernorm", norm)]
    kept, dropped = share.split(modules, share.norm_input())
    # Sequence parallelism gathers the incoming gradient before the products of the row-parallel projection.
    gathered = np.where(share.sp, share.full_hidden * share.size, 0)
    output_again = np.where(share.columns.drops("mlp"), share.state, 0)
    backward = np.maximum(backward, gathered + width * share.size) + output_again
    backward = np.maximum(backward, share.norm_backward(kept + dropped))
    kept = kept + 2 * share.between_nodes()
    return HalfLayer(kept=kept, dropped=dropped, forward=np.zeros_like(kept), backward=share.state + backward)


def experts_mlp(share: RankShare) -> HalfLayer:
    """Return the bytes of the residual sum after attention, of its norm, and of the experts that follow.

    The experts include the router, the shared experts, the dispatch and the routed experts.
    """
    model = share.model
    assert model.num_moe_experts and model.moe_ffn_hidden_size and model.moe_router_topk
    tokens = share.hidden / model.hidden_size
    routed_rows = tokens * model.moe_router_topk * share.load.kept
    dispatched = routed_rows * share.etp * model.hidden_size
    width = routed_rows * model.moe_ffn_hidden_size
    # Saved tensors scale with the load summed over layers. A pass needs memory for the layer with the highest load.
    worst = share.load.worst / share.load.kept
    matrix = expert(model).sharded / share.etp / (3 if model.gated_linear_unit else 2)
    inner = _projections(share, width, matrix, is_weighted=True)[0]
    # Transformer Engine computes all experts of a rank at once; plain Torch computes them one after the other.
    local_experts = model.num_moe_experts / share.ep
    in_turn = 1 if share.fused else local_experts
    inner_backward = _projections(share, width * worst / in_turn, matrix, is_weighted=True)[1]
    shared, shared_backward = _shared_experts(share)
    activation = width * share.linear if share.fused else np.zeros_like(width)
    norm = share.norm(share.hidden)
    router = tokens * model.num_moe_experts * 14
    routed = dispatched * share.linear + inner - activation + router
    is_dropped = share.columns.drops("moe")
    kept, dropped = share.split(
        [("layernorm", norm), ("moe_act", activation), ("shared_experts", shared)],
        share.norm_input() + routed,
    )
    everything = routed + activation + shared
    input_kept = np.where(share.columns.drops("layernorm"), 0, norm)
    kept = np.where(is_dropped, share.norm_input() + input_kept, kept)
    dropped = np.where(is_dropped, everything + norm - input_kept, dropped)
    arrived = dispatched * worst
    forward = _dispatch_forward(share, arrived, local_experts)
    backward = np.maximum(2 * arrived * share.size, arrived * share.size + inner_backward)
    backward = np.maximum(backward, _gathered_backward(share, arrived))
    backward = np.maximum(backward, shared_backward)
    backward = np.maximum(backward, share.norm_backward(kept + dropped))
    has_shared = model.moe_shared_expert_intermediate_size is not None
    return HalfLayer(
        kept=kept + (2 + has_shared) * share.between_nodes(),
        dropped=dropped,
        forward=forward,
        backward=share.state + np.maximum(backward, np.where(is_dropped, forward, 0)),
    )


def expert_grid(share: RankShare) -> Floats:
    """Return the bytes of the hidden states of all tokens on the ep * etp ranks that share a set of experts.

    These ranks are called an expert grid.
    """
    return share.state * share.ep * share.etp


def gathers_experts(share: RankShare) -> Bools:
    """Return a mask of the layouts with the all-gather dispatcher; shape [rows].

    It gathers all tokens of the ep * etp ranks that share a set of experts on each of these ranks.
    """
    return share.columns.among("moe_token_dispatcher_type", "allgather")


def _projections(
    share: RankShare, width: Floats, matrix: Floats | float, is_weighted: bool = False
) -> tuple[Floats, Floats]:
    """Return the bytes that an MLP saves between its projections, and the further bytes that its backward pass needs.

    Args:
        share: The rank's share.
        width: Number of elements of one projection's output, which is tokens times the width of the MLP on the rank.
        matrix: Number of elements of one weight matrix. Plain Torch allocates the whole gradient of a matrix before it
            adds the gradient to the accumulated one.
        is_weighted: Whether the output of the activation is multiplied by the router's probabilities.
    """
    gated = 2 if share.model.gated_linear_unit else 1
    if share.fused:
        kept = width * (gated * share.size + share.linear)
        return kept, width * gated * share.size
    # Torch saves the projection, the activation, the linear half plus its offset, their product, and the product with
    # the router's probabilities.
    steps = (3 if share.model.gated_linear_unit else 1) + is_weighted
    kept = width * (gated + steps) * share.size
    weight_gradient = matrix * share.size
    second = width * share.size + weight_gradient
    # The probabilities, their products with the activation, and the gradients of these products are in fp32.
    activation = width * (14.0 if is_weighted and share.size < 4 else gated * share.size)
    first = (gated * weight_gradient) - width * steps * share.size + share.full_hidden * share.size
    return kept, np.maximum(np.maximum(second, activation), first)


def _shared_experts(share: RankShare) -> tuple[Floats, Floats]:
    """Return the bytes that the shared experts save, and the bytes that their backward pass needs; 0 without them."""
    model, width = share.model, share.model.moe_shared_expert_intermediate_size
    if width is None:
        return np.zeros_like(share.tokens), np.zeros_like(share.tokens)
    elements = share.tokens / share.tp * width
    kept, backward = _projections(share, elements, width * model.hidden_size / share.tp)
    # The gate saves the output of the shared experts, which it multiplies.
    return kept + (share.state if model.moe_shared_expert_gate else 0), backward


def _dispatch_forward(share: RankShare, dispatched: Floats, local_experts: Floats) -> Floats:
    """Return the bytes that the dispatch of tokens to experts and back needs in the forward pass, beside saved tensors.

    They are the copies of dispatched tokens that exist at the same time, and the output of the shared experts. With the
    alltoall dispatcher, variables of Python still refer to the permuted tokens and the result of the all-to-all while
    the experts' output is sorted back and sent (moe_layer.py, custom_forward). If the layer sorts and sends there are
    four copies, if it does only one of both there are three, and otherwise there is one. It sorts if a rank has several
    experts, and sends if ep is above 1.

    Args:
        share: The rank's share.
        dispatched: Number of elements of the tokens that arrive on this rank.
        local_experts: Number of experts on this rank.
    """
    sorts, sends = (local_experts > 1).astype(np.float64), (share.ep > 1).astype(np.float64)
    copies = 1 + 2 * sorts + sends * (2 - sorts)
    flex = share.columns.among("moe_token_dispatcher_type", "flex")
    if flex.any():
        # DeepEP sends each token once per rank, and permutes what arrived; HybridEP permutes while it sends.
        topk = share.model.moe_router_topk or 1
        once = share.ep / topk * (1 - (1 - 1 / share.ep) ** topk)
        deepep = share.columns.among("moe_flex_dispatcher_backend", "deepep")
        copies = np.where(flex, 1 + np.where(deepep, once, 0), copies)
    alltoall = copies * dispatched * share.size
    # The all-gather dispatcher brings the outputs back into the order of all tokens of the expert grid, and sums them
    # up in fp32.
    grid = expert_grid(share)
    fp32_copy = 4 / share.size if share.size < 4 else 0.0
    in_fp32 = np.where(share.ep * share.etp > 1, fp32_copy * (grid + share.state), 0)
    gathered = grid + np.maximum(dispatched * share.size, in_fp32)
    shared_output = share.state if share.model.moe_shared_expert_intermediate_size is not None else 0
    return np.where(gathers_experts(share), gathered, alltoall) + shared_output


def _gathered_backward(share: RankShare, arrived: Floats) -> Floats:
    """Return the bytes that the backward pass of the all-gather dispatcher needs; 0 for other dispatchers.

    The pass holds the gradient of all tokens of the expert grid. In addition it first holds the fp32 copy in which this
    gradient arrives, and then the gradient of the `arrived` elements, which are those of the tokens for this rank.
    """
    grid = expert_grid(share)
    fp32_grid = grid * (4 / share.size if share.size < 4 else 0)
    gathered = grid + np.maximum(fp32_grid, arrived * share.size)
    return np.where(gathers_experts(share) & (share.ep * share.etp > 1), gathered, 0)
