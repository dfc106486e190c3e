"""Bytes of buffers beside model and activations: for the whole run, the pipeline schedule and the optimizer's step."""

import numpy as np

from tuner.core.columns import Bools, Floats, Ints
from tuner.core.parameters import attention
from tuner.predict.memory.mlp import expert_grid, gathers_experts
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import DENSE, MOE, StagesInFlight

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""Bytes of the workspace of one cuBLAS handle on Hopper and newer. Published: Transformer Engine,
get_cublas_workspace_size_bytes; PyTorch's documentation of CUBLAS_WORKSPACE_CONFIG."""


def run_buffers(share: RankShare, stages: StagesInFlight, layers: Floats, vocabulary: Floats) -> Floats:
    """Return the bytes of the buffers that a rank of each stage has for the whole run; shape [stages].

    Sequence parallelism gathers the input of the output layer into a buffer (tensor_parallel/layers.py), which the
    all-gather dispatcher uses too (moe/token_dispatcher.py). Each model chunk has rotary angles. Transformer Engine has
    one empty gradient per shape of the weights whose gradients it accumulates in the product; the hooks of gradients
    receive it (module/base.py, get_dummy_wgrad). Transformer Engine has one workspace for cuBLAS, and one for each of
    the four streams of a grouped product (cpp_extensions/gemm.py). PyTorch has a cuBLAS workspace of its own on stages
    with the output layer or with experts.

    Args:
        share: The rank's share.
        stages: The stages.
        layers: Number of layers of each stage, with those of multi-token prediction; shape [stages, (DENSE, MOE)].
        vocabulary: Rows of the embedding on a rank, one value per stage.
    """
    row, last, has_experts = stages.row, stages.last, layers[:, MOE] > 0
    gathers = share.sp[row] & (last if share.fused else np.ones_like(last))
    total = np.where(gathers, share.full_hidden[row] * share.size, 0)
    gathers = (gathers_experts(share) & (share.ep * share.etp > 1))[row] & has_experts
    total = np.maximum(total, np.where(gathers, expert_grid(share)[row], 0))
    total += _rotary_tables(share) * share.columns["vpp"][row]
    if share.torch_on_cuda:
        return total + CUBLAS_WORKSPACE_BYTES
    if not share.fused:
        return total
    weights = _shapes_of_weights(share, stages, layers, vocabulary)
    workspaces = 1 + 4 * has_experts + (last | has_experts)
    return total + weights * share.size + workspaces * CUBLAS_WORKSPACE_BYTES


def _shapes_of_weights(
    share: RankShare, stages: StagesInFlight, layers: Floats, vocabulary: Floats
) -> Floats:
    """Return the elements of one weight per distinct shape, summed over the shapes in a stage's linear layers.

    The arguments are those of `run_buffers`; the result has shape [stages].
    """
    model, tp, etp = share.model, share.tp[stages.row], share.etp[stages.row]
    of_attention = attention(model)
    mlp = (3 if model.gated_linear_unit else 2) * model.hidden_size
    has_layers = layers[:, DENSE] + layers[:, MOE] > 0
    elements = np.where(
        has_layers, (of_attention.sharded / share.tp + of_attention.replicated)[stages.row], 0
    )
    elements += np.where(layers[:, DENSE] > 0, mlp * model.ffn_hidden_size / tp, 0)
    widths = (model.moe_ffn_hidden_size or 0) / etp + (model.moe_shared_expert_intermediate_size or 0) / tp
    elements += np.where(layers[:, MOE] > 0, mlp * widths, 0)
    return elements + np.where(stages.last, vocabulary * model.hidden_size, 0)


def _rotary_tables(share: RankShare) -> float:
    """Return the bytes of the rotary angles of all positions, in fp32, that one model chunk has for the whole run.

    Each model chunk computes the angles once and stores two copies (rotary_pos_embedding.py, get_emb).
    """
    model = share.model
    if model.position_embedding_type != "rope":
        return 0.0
    width = model.qk_pos_emb_head_dim if model.multi_latent_attention else model.kv_channels
    return 2.0 * share.seq * (width or 0) * 4


def pipeline_tensors(
    share: RankShare, row: Ints, behind: Bools, forwards_left: Ints
) -> tuple[Floats, Floats]:
    """Return the bytes of hidden states that the pipeline schedule holds in addition to the activations in flight.

    There are two arrays of shape [stages]: one for a moment at which a layer runs, and one for the moment of the loss.
    The 1F1B schedule holds the gradient that it sent last until the next gradient is computed. The interleaved schedule
    was counted on traced runs (schedules.py): each chunk holds the input that it received last, tensors that were
    received early wait for `group - pp` passes, and overlapped receives have buffers. No more tensors wait than there
    are forward passes left. Here `group` is `microbatch_group_size_per_vp_stage`.

    Args:
        share: The rank's share.
        row: Index of the layout of each stage.
        behind: Whether the stage is not the first of its pipeline.
        forwards_left: Number of forward passes that follow after the first backward pass.
    """
    vpp, pp = share.columns["vpp"][row], share.columns["pp"][row]
    group = share.columns["microbatch_group_size_per_vp_stage"][row]
    early = share.columns.on("overlap_p2p_comm")[row]
    waiting = vpp - 2 + np.where(group > 0, group - pp, 0)
    most = forwards_left + 1 + behind
    at_layer = np.minimum(2 + early + behind * (2 + 2 * early) + waiting, most)
    at_loss = np.minimum(behind + 3 * early + waiting, most)
    at_layer, at_loss = (np.where(vpp > 1, states, behind) for states in (at_layer, at_loss))
    return share.state[row] * at_layer, share.state[row] * at_loss


def adam_step(share: RankShare, vocabulary: Floats, updated: Floats) -> Floats:
    """Return the bytes that Adam's step needs temporarily on each stage; shape [stages].

    For the weight that it updates, Torch's Adam on CPU allocates a square root and a denominator in fp32. The largest
    weight counts: the embedding, which has `vocabulary` rows, or less if the rank updates only `updated` weights in
    all. On CUDA it updates all weights at once, and has one square root of each (optim/adam.py, _multi_tensor_adam).
    Fused Adam allocates nothing.
    """
    if share.fused:
        return np.zeros_like(updated)
    if share.torch_on_cuda:
        return 4.0 * updated
    return 2 * 4.0 * np.minimum(vocabulary * share.model.hidden_size, updated)
