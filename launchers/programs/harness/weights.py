"""Sets the initial weights from the random seed and each weight's place in the model, whatever the layout is.

So every layout of a workload starts from the same model and, with the same data, has the same losses. Megatron's own
initialisation would not do, since it draws from random states that differ by rank.
"""

import re
from collections.abc import Iterator
from hashlib import blake2b

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

STD = 0.02
"""The standard deviation of a weight. Published: Megatron's default `init_method_std`."""

_CHUNK_ELEMENTS = 1 << 22
"""Number of elements that are computed at a time: this bounds the temporary tensors to 32 MiB, less than those of any
training step."""


def initialize_weights(chunks: list[GPTModel], seed: int) -> None:
    """Set every parameter of this rank: matrices to uniform random values, biases and sinks to 0, norms to 1."""
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in global_parameters(chunk):
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if re.search(r"(bias\d*|softmax_offset)$", name) else 1.0)
                else:
                    _fill(parameter, name, _key(seed, _source(name, chunk)), chunk.config)


def global_parameters(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of a chunk with its name in the whole model.

    In this name, the layers and the experts are numbered over the whole model.
    """
    layers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
    experts = chunk.config.num_moe_experts or 0
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    first_expert = experts // chunk.config.expert_model_parallel_size * ep_rank
    for local_name, parameter in chunk.named_parameters():
        name = local_name
        for prefix, number in layers.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
                break
        yield _with_global_expert(name, first_expert), parameter


def _source(name: str, chunk: GPTModel) -> str:
    """Return the name that determines a parameter's values: its own, or that of the parameter it is tied to."""
    # If the model ties the embedding to the output layer, the last stage has a copy of the embedding.
    tied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
    return "embedding.word_embeddings.weight" if tied else name


def _with_global_expert(name: str, first_expert: int) -> str:
    def shifted(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) + first_expert}"

    # SequentialMLP numbers its experts as modules, Transformer Engine's grouped MLP as weights and biases.
    return re.sub(r"(experts\.local_experts\.|experts\.linear_fc\d\.(?:weight|bias))(\d+)", shifted, name)


def _fill(parameter: Tensor, name: str, key: int, config: TransformerConfig) -> None:
    """Fill this rank's shard of a matrix, [rows, columns].

    The value of an element follows from its index in the whole matrix.
    """
    halves = [parameter]
    if config.gated_linear_unit and re.search(r"linear_fc1\.weight\d*$", name):
        # A rank's gate and up projections are shards of two matrices, stacked.
        halves = list(parameter.chunk(2))
    dimension = _sharded_dimension(parameter, name)
    rank, size = (0, 1) if dimension is None else _place(name)
    for number, half in enumerate(halves):
        rows, columns = half.shape
        row_offset, column_offset = (0, rank * columns) if dimension == 1 else (rank * rows, 0)
        all_columns = columns * size if dimension == 1 else columns
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = half[start : start + step]
            row = torch.arange(start, start + len(part), device=part.device) + row_offset
            column = torch.arange(columns, device=part.device) + column_offset
            part.copy_(uniform(row[:, None] * all_columns + column[None, :], key + number))


def _sharded_dimension(parameter: Tensor, name: str) -> int | None:
    """Return the dimension of a matrix that is sharded over tensor parallel ranks; None if each rank has the whole.

    Megatron marks its own modules rightly. Transformer Engine marks every matrix as sharded, and by rows unless it
    reduces the output itself, which it leaves to the dispatcher for experts. So the name counts first.
    """
    if not getattr(parameter, "tensor_model_parallel", False) or "down_proj." in name:
        return None
    if re.search(r"\.linear_fc2\.weight\d*$", name):
        return 1
    return int(getattr(parameter, "partition_dim", 0))


def _place(name: str) -> tuple[int, int]:
    """Return this rank's index among the ranks over which the weight of this name is sharded, and their number."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def uniform(index: Tensor, key: int) -> Tensor:
    """Return fp32 values that are uniform hashes of int64 indices, with mean 0 and standard deviation STD.

    The hash is SplitMix64's finaliser; `key` makes the values of two parameters differ.
    """
    value = index + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ (value >> shift)) * factor
    bits = ((value ^ (value >> 31)) >> 8) & 0xFFFFFF
    return (bits.to(torch.float32) / (1 << 23) - 1.0) * (STD * 3**0.5)


def _key(seed: int, name: str) -> int:
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
