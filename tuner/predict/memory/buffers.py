"""Bytes beside the model and its activations: buffers of the whole run, of the schedule, and of the optimizer's
step."""

import numpy as np

from tuner.core.columns import Bools, Floats, Ints
from tuner.core.parameters import attention
from tuner.predict.memory.mlp import expert_grid, gathers_experts
from tuner.predict.memory.share import RankShare
from tuner.predict.memory.stages import DENSE, MOE, StagesInFlight

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""Workspace of one cuBLAS handle on Hopper and newer. Published: Transformer Engine, get_cublas_workspace_size_bytes;
PyTorch's documentation of CUBLAS_WORKSPACE_CONFIG."""


def run_buffers(share: RankShare, stages: StagesInFlight, layers: Floats, vocabulary: Floats) -> Floats:
    """Return the bytes that each stage holds beside the model for the whole run.

    Sequence parallelism gathers the input of the output layer into a buffer (tensor_parallel/layers.py), which the
    all-gather dispatcher uses too (moe/token_dispatcher.py). For the hooks of gradients, Transformer Engine keeps one
    empty gradient per shape of weight whose accumulation it fuses (module/base.py, get_dummy_wgrad). Transformer Engine
    has one workspace for cuBLAS, and one for each of the four streams of a grouped product (cpp_extensions/gemm.py).
    Torch has a workspace of its own on stages with the output layer or with experts.

    Args:
        share: The rank's share.
        stages: The stages.
        layers: Layers of each stage, those of multi-token prediction included, shape [stages, (DENSE, MOE)].
        vocabulary: Rows of the embedding on a rank, one value per stage.
    """
    row, last, has_experts = stages.row, stages.last, layers[:, MOE] > 0
    gathers = share.sp[row] & (last if share.fused else np.ones_like(last))
    total = np.where(gathers, share.full_hidden[row] * share.size, 0)
    gathers = (gathers_experts(share) & (share.ep * share.etp > 1))[row] & has_experts
    total = np.maximum(total, np.where(gathers, expert_grid(share)[row], 0))
    total += _rotary_tables(share) * share.columns["vpp"][row]
    if not share.fused:
        return total
    weights = _shapes_of_weights(share, stages, layers, vocabulary)
    workspaces = 1 + 4 * has_experts + (last | has_experts)
    return total + weights * share.size + workspaces * CUBLAS_WORKSPACE_BYTES


def _shapes_of_weights(
    share: RankShare, stages: StagesInFlight, layers: Floats, vocabulary: Floats
) -> Floats:
    """Return the number of elements of one weight per shape, summed over the shapes in a stage's linear layers."""
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
    """Return the bytes of one model chunk's rotary angles of all positions, in fp32.

    Each model chunk makes the angles once and keeps them twice (rotary_pos_embedding.py, get_emb).
    """
    model = share.model
    if model.position_embedding_type != "rope":
        return 0.0
    width = model.qk_pos_emb_head_dim if model.multi_latent_attention else model.kv_channels
    return 2.0 * share.seq * (width or 0) * 4


def pipeline_tensors(
    share: RankShare, row: Ints, behind: Bools, forwards_left: Ints
) -> tuple[Floats, Floats]:
    """Return the bytes of hidden states that the schedule holds beside the activations in flight.

    The first array is for the pass of a layer, the second for the loss.

    The 1F1B schedule holds the gradient that it sent last until the next gradient is made. The interleaved schedule was
    counted on traced runs (schedules.py): each chunk holds the input that it took last, tensors that were received
    early wait `group - pp` turns, and overlapped receives have buffers. No more tensors wait than there are forward
    passes left.

    Args:
        share: The rank's share.
        row: Index of the layout of each stage.
        behind: Whether the stage comes after the first stage.
        forwards_left: Forward passes that follow after the first backward pass.
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
    """Return the bytes that Adam's step needs temporarily on each stage.

    Torch's Adam makes a root and a denominator for the weight that it updates; fused Adam makes nothing. The largest
    weight counts: the embedding, or less if this rank updates only `updated` weights.
    """
    if share.fused:
        return np.zeros_like(updated)
    return 2 * 4.0 * np.minimum(vocabulary * share.model.hidden_size, updated)
