"""Every layout starts from the same model: each rank's weights are pieces of those that one rank alone has."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from launchers.programs.harness.weights import global_parameters
from search_spaces.loader import load_model
from tests.cuda.builds import built
from tuner.core.layout import Layout
from tuner.core.workload import Model

GPT, MOE, MLA = (load_model(name) for name in ("tiny-gpt", "tiny-moe", "tiny-mla"))
GPT_OSS = replace(
    MOE,
    add_bias_linear=True,
    activation_func="quick_gelu",
    softmax_type="learnable",
    moe_shared_expert_intermediate_size=None,
)
WORLD_SIZE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One rank's part of a parameter."""

    values: Tensor
    tp_rank: int
    etp_rank: int


def pieces(model: Model, layout: Layout, rank: int, world_size: int) -> Mapping[str, Piece]:
    """Return a rank's parameters by their names in the whole model."""
    with built(model, layout, rank, world_size) as chunks:
        return {
            name: Piece(
                values=parameter.detach().float(),
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
            )
            for chunk in chunks
            for name, parameter in global_parameters(chunk)
        }


def shard(whole: Tensor, shape: torch.Size, rank: int, is_gated: bool) -> Tensor:
    """Return the piece of this shape that a rank should have: along the one dimension in which the shapes differ."""
    if is_gated:  # the gate and the up projection are sharded each for itself
        half = torch.Size((shape[0] // 2, *shape[1:]))
        return torch.cat([shard(part, half, rank, is_gated=False) for part in whole.chunk(2)])
    for dimension, (full, own) in enumerate(zip(whole.shape, shape, strict=True)):
        if full != own:
            return whole.narrow(dimension, rank * own, own)
    return whole


def differing(model: Model, layout: Layout) -> Iterator[str]:
    """Yield the name and the rank of each parameter that is no piece of what one rank alone has."""
    alone = pieces(model, Layout(), 0, 1)
    for rank in range(WORLD_SIZE):
        for name, piece in pieces(model, layout, rank, WORLD_SIZE).items():
            is_gated = (
                model.gated_linear_unit and re.search(r"linear_fc1\.(weight|bias)\d*$", name) is not None
            )
            place = piece.etp_rank if ".experts." in name else piece.tp_rank
            if not torch.equal(piece.values, shard(alone[name].values, piece.values.shape, place, is_gated)):
                yield f"{name} on rank {rank}"


LAYOUTS = {
    "dense": (GPT, Layout(tp=2, sp=True)),
    "more ranks than query groups": (GPT, Layout(tp=4, sp=True)),
    "pipeline": (GPT, Layout(tp=2, pp=2, vpp=2)),
    "experts whole": (MOE, Layout(tp=2, sp=True, ep=4, etp=1)),
    "experts sharded": (MOE, Layout(tp=2, sp=True, ep=2, etp=2)),
    "experts sharded without expert parallelism": (MOE, Layout(tp=2, sp=True, etp=2)),
    "biases of experts": (GPT_OSS, Layout(tp=2, sp=True, ep=2, etp=1)),
    "latent attention": (MLA, Layout(tp=2, sp=True, ep=4, etp=1)),
    "latent attention without sequence parallelism": (MLA, Layout(tp=4)),
}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("model", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_rank_has_a_piece_of_the_same_weights(model: Model, layout: Layout) -> None:
    assert list(differing(model, layout)) == []


@pytest.mark.usefixtures("cuda")
def test_biases_and_sinks_start_at_zero() -> None:
    for name, piece in pieces(GPT_OSS, Layout(), 0, 1).items():
        if re.search(r"(bias\d*|softmax_offset)$", name):
            assert not piece.values.any(), name
