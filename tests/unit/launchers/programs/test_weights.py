"""Initial weights follow from the seed and a weight's place in the model, also where its marks are wrong."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from launchers.programs.harness.weights import initialize_weights

TP = 2


class Chunk:
    """A model chunk with one parameter, marked as Transformer Engine marks it."""

    share_embeddings_and_output_weights = False
    decoder = SimpleNamespace(layers=[])
    config = SimpleNamespace(num_moe_experts=None, expert_model_parallel_size=1, gated_linear_unit=False)

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self.parameter = name, torch.full(shape, 3.0)
        marked: Any = self.parameter
        marked.tensor_model_parallel, marked.partition_dim = True, 0

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield self._name, self.parameter


def weights(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...], rank: int, size: int
) -> Tensor:
    for group in ("tensor_model", "expert_tensor"):
        monkeypatch.setattr(parallel_state, f"get_{group}_parallel_rank", lambda: rank)
        monkeypatch.setattr(parallel_state, f"get_{group}_parallel_world_size", lambda: size)
    monkeypatch.setattr(parallel_state, "get_expert_model_parallel_rank", lambda: 0)
    chunk: Any = Chunk(name, shape)
    initialize_weights([chunk], seed=1)
    parameter: Tensor = chunk.parameter
    return parameter


@pytest.mark.parametrize("kind", ["q", "kv"])
def test_each_rank_has_the_whole_down_projections_of_latent_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"decoder.layers.0.self_attention.linear_{kind}_down_proj.weight"
    alone, first, second = (
        weights(monkeypatch, name, (8, 4), rank, size) for rank, size in ((0, 1), (0, TP), (1, TP))
    )
    assert torch.equal(first, alone) and torch.equal(second, alone)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc2.weight3", 1),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight3", 0),
        ("decoder.layers.0.mlp.linear_fc2.weight", 1),
        ("decoder.layers.0.self_attention.linear_qkv.weight", 0),
    ],
)
def test_each_rank_has_its_piece_of_a_sharded_weight(
    name: str, dimension: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(monkeypatch, name, (8, 4), 0, 1)
    shape = (8, 4 // TP) if dimension else (8 // TP, 4)
    ranks = [weights(monkeypatch, name, shape, rank, TP) for rank in range(TP)]
    assert torch.equal(torch.cat(ranks, dim=dimension), whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.layers.0.mlp.experts.linear_fc1.bias3", 0.0),
        ("decoder.layers.0.self_attention.linear_proj.bias", 0.0),
        ("decoder.layers.0.self_attention.core_attention.softmax_offset", 0.0),
        ("decoder.layers.0.input_layernorm.weight", 1.0),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", 1.0),
    ],
)
def test_biases_and_sinks_start_at_zero_and_norms_at_one(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(weights(monkeypatch, name, (8,), 0, 1).tolist()) == {value}
