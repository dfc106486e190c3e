"""Adapts Gloo to Megatron's calls: NumPy split sizes, collectives of uneven sizes, and pipeline messages with tags."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

FORWARD, BACKWARD = 1, 2
"""Tags of the messages between pipeline stages: FORWARD for activations, BACKWARD for gradients."""


def complete_gloo() -> None:
    """Replace, in this process, the collectives and pipeline messages that Gloo cannot do as Megatron calls them."""
    distributed: Any = dist
    distributed.all_to_all_single = _with_integer_splits(dist.all_to_all_single)
    distributed.all_gather = _with_uneven_gather(dist.all_gather)
    distributed.reduce_scatter = _with_uneven_scatter(dist.reduce_scatter)
    p2p_communication._p2p_ops = _exchange_with_neighbours
    p2p_communication._batched_p2p_ops = lambda **tensors: list(_exchange_with_neighbours(**tensors).values())


def _exchange_with_neighbours(
    *,
    tensor_send_prev: Tensor | None,
    tensor_recv_prev: Tensor | None,
    tensor_send_next: Tensor | None,
    tensor_recv_next: Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, Any]:
    """Start the sends and receives of a pipeline stage; return the requests by name, such as `send_prev`.

    The messages carry tags, since Gloo matches untagged ones by order alone: in a pipeline of two interleaved stages,
    each stage is both the previous and the next neighbour of the other.
    """
    requests: dict[str, Any] = {}
    for name, start, tensor, neighbour, tag in (
        ("send_prev", dist.isend, tensor_send_prev, prev_pipeline_rank, BACKWARD),
        ("recv_prev", dist.irecv, tensor_recv_prev, prev_pipeline_rank, FORWARD),
        ("send_next", dist.isend, tensor_send_next, next_pipeline_rank, FORWARD),
        ("recv_next", dist.irecv, tensor_recv_next, next_pipeline_rank, BACKWARD),
    ):
        if tensor is not None:
            # A view keeps the data alive: the schedule frees a sent tensor's data before Gloo has read it.
            requests[name] = start(tensor.detach(), neighbour, group=group, tag=tag)
    return requests


def _with_integer_splits(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return an all-to-all that converts split sizes to Python integers, as Gloo requires; Megatron passes NumPy's."""

    def integers(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    @wraps(collective)
    def wrapped(
        output: Tensor,
        tensor: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return collective(
            output, tensor, integers(output_split_sizes), integers(input_split_sizes), *args, **kwargs
        )

    return wrapped


def _uneven(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape for tensor in tensors)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _with_uneven_gather(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return an all-gather that pads the first dimension to the largest size, since Gloo needs equal sizes."""

    @wraps(collective)
    def wrapped(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _uneven(tensor_list):
            return collective(tensor_list, tensor, *args, **kwargs)
        rows = max(len(part) for part in tensor_list)
        gathered = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in tensor_list]
        collective(gathered, _padded(tensor, rows), *args, **kwargs)
        for part, source in zip(tensor_list, gathered, strict=True):
            part.copy_(source[: len(part)])
        return None

    return wrapped


def _with_uneven_scatter(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reduce-scatter that pads the first dimension to the largest size, since Gloo needs equal sizes."""

    @wraps(collective)
    def wrapped(output: Tensor, input_list: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        if not _uneven(input_list):
            return collective(output, input_list, *args, **kwargs)
        rows = max(len(part) for part in input_list)
        padded_output = output.new_empty(rows, *output.shape[1:])
        collective(padded_output, [_padded(part, rows) for part in input_list], *args, **kwargs)
        output.copy_(padded_output[: len(output)])
        return None

    return wrapped
