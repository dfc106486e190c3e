"""The collectives that are timed, in groups of neighbouring and of strided ranks, called as training calls them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from launchers.programs.calibration.points import PointTable, TimedPoint, Work
from tuner.predict.calibration import CalibrationPlan, Collective

Call = Callable[[dist.ProcessGroup, int, torch.device], Work]
"""A function of a process group, a number of bytes and a device. It returns the work to time: one collective in this
group on a message of this size, which counts the bytes of all ranks together."""


def collectives(
    plan: CalibrationPlan, device: torch.device
) -> tuple[dict[Collective, PointTable], dict[Collective, PointTable]]:
    """Return the table of each collective in groups of neighbouring ranks, and its table in strided groups.

    The group of the whole world counts as both, and its points are in both tables.
    """
    sizes = (group_sizes(dist.get_world_size()), plan.message_bytes)
    if not sizes[0]:
        return {}, {}
    neighbours = [_group_of_this_rank(ranks, strided=False) for ranks in sizes[0]]
    strided = [_group_of_this_rank(ranks, strided=True) for ranks in sizes[0][:-1]]

    def points(call: Call, groups: list[dist.ProcessGroup]) -> list[TimedPoint]:
        return [
            TimedPoint(partial(call, group, size, device)) for group in groups for size in plan.message_bytes
        ]

    near = {kind: points(call, neighbours) for kind, call in CALLS.items()}
    whole_world = {kind: group_points[-len(plan.message_bytes) :] for kind, group_points in near.items()}
    apart = {kind: points(call, strided) + whole_world[kind] for kind, call in CALLS.items()}
    return (
        {kind: PointTable(sizes, group_points) for kind, group_points in near.items()},
        {kind: PointTable(sizes, group_points) for kind, group_points in apart.items()},
    )


def group_sizes(world_size: int) -> tuple[int, ...]:
    """Return the group sizes, from 2, that divide the world size."""
    return tuple(size for size in range(2, world_size + 1) if world_size % size == 0)


def groups_of(world_size: int, ranks: int, strided: bool) -> list[list[int]]:
    """Return the ranks of the world, divided into groups of `ranks` ranks.

    A group consists of neighbours, or, if `strided`, of ranks that are as far apart as possible.
    """
    count = world_size // ranks
    if strided:
        return [list(range(first, world_size, count)) for first in range(count)]
    return [list(range(first, first + ranks)) for first in range(0, world_size, ranks)]


def _group_of_this_rank(ranks: int, strided: bool) -> dist.ProcessGroup:
    """Create all groups of `ranks` ranks, as every rank must, and return the one that contains this rank."""
    world_size, mine = dist.get_world_size(), None
    for members in groups_of(world_size, ranks, strided):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _buffers(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a tensor of about `whole_bytes` bytes, and a tensor of one rank's share of these bytes."""
    share = -(-whole_bytes // 4 // group.size())
    return torch.zeros(share * group.size(), device=device), torch.zeros(share, device=device)


def _all_reduce(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> Work:
    whole, _ = _buffers(group, whole_bytes, device)
    return lambda: dist.all_reduce(whole, group=group)


def _all_gather(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> Work:
    whole, share = _buffers(group, whole_bytes, device)
    return lambda: dist.all_gather_into_tensor(whole, share, group=group)


def _reduce_scatter(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> Work:
    whole, share = _buffers(group, whole_bytes, device)
    return lambda: dist.reduce_scatter_tensor(share, whole, group=group)


def _all_to_all(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> Work:
    whole, _ = _buffers(group, whole_bytes, device)
    received = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(received, whole, group=group)


def _send(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> Work:
    """Return work that sends to the next rank of the group and receives from the previous one.

    It calls the function that Megatron's pipeline schedule calls.
    """
    whole, _ = _buffers(group, whole_bytes, device)
    received = torch.empty_like(whole)
    members = dist.get_process_group_ranks(group)
    place = members.index(dist.get_rank())
    exchange: Any = p2p_communication._batched_p2p_ops

    def work() -> None:
        requests = exchange(
            tensor_send_prev=None,
            tensor_recv_prev=received,
            tensor_send_next=whole,
            tensor_recv_next=None,
            group=group,
            prev_pipeline_rank=members[place - 1],
            next_pipeline_rank=members[(place + 1) % len(members)],
        )
        for request in requests:
            request.wait()

    return work


CALLS: dict[Collective, Call] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send": _send,
}
