"""Measure what this machine does: `torchrun ... -m launchers.programs.calibration PLAN.json CALIBRATION.json`.

Every rank does the same at the same time, as in training, so that ranks which share cores or links feel each other.
A point is timed by a batch of repetitions that is long against the scheduler's slices and the clock; the slowest
rank's time counts, and of several passes the median. The calls are those of training, on CPU through the same
stand-ins.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor, nn

from launchers.programs.harness.cpu import enable_cpu
from tuner.core.workload import Precision
from tuner.files import read_json, write_json
from tuner.predict.calibration import Calibration, CalibrationPlan, Collective, TimeTable

Work = Callable[[], object]
Call = Callable[[dist.ProcessGroup, int, torch.device], Work]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MLP_OPERATIONS = 5
"""Of `_small_mlp`: its four modules and a sum."""
_TIMEOUT = timedelta(minutes=5)


def main(arguments: list[str]) -> None:
    """Measure as this rank; the first writes the calibration."""
    plan = read_json(CalibrationPlan, Path(arguments[0]))
    enable_cpu()
    device = torch.device(plan.machine.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    calibration = measure(plan, device)
    if dist.get_rank() == 0:
        write_json(Path(arguments[1]), calibration)
    dist.barrier()
    dist.destroy_process_group()


def measure(plan: CalibrationPlan, device: torch.device) -> Calibration:
    """Measure everything that is planned; the same on every rank."""
    host = _Table((), [_Point(partial(_small_mlp, device), waits=False)])
    gemm = {precision: _products(plan, precision, device) for precision in plan.precisions}
    copy = _Table((plan.copy_bytes,), [_Point(partial(_copy, size, device)) for size in plan.copy_bytes])
    near, apart = _collectives(plan, device)
    tables = (host, *gemm.values(), copy, *near.values(), *apart.values())
    points = dict.fromkeys(point for table in tables for point in table.points)  # some are in two tables
    # Pass by pass, so that whatever else the machine does for a second spoils one reading of a point, not all.
    for _ in range(plan.passes):
        for point in points:
            point.read(plan.batch_s, device)
    return Calibration(
        machine=plan.machine,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        host_us=host.times.ms[0] / MLP_OPERATIONS * 1000,
        gemm={precision: table.times for precision, table in gemm.items()},
        copy=copy.times,
        collectives={kind: table.times for kind, table in near.items()},
        strided_collectives={kind: table.times for kind, table in apart.items()},
    )


@dataclass(slots=True, eq=False)
class _Point:
    """One piece of work that all ranks do at once."""

    make: Callable[[], Work]
    waits: bool = True
    """For the end of it on the device, else until the host has launched it."""
    repeats: int = 0
    """In a batch that takes long enough; found at the first reading."""
    readings_ms: list[float] = field(default_factory=list)

    def read(self, batch_s: float, device: torch.device) -> None:
        """Time a batch of it, with its tensors made anew."""
        work = self.make()
        work()
        repeats = self.repeats or 1
        taken_s = self._batch_s(work, repeats, device)
        while not self.repeats and taken_s < batch_s:
            # Not at once all that seem to be missing: the first few may have been interrupted, or cold.
            repeats *= min(max(2, round(batch_s / taken_s)), 10)
            taken_s = self._batch_s(work, repeats, device)
        self.repeats = repeats
        self.readings_ms.append(taken_s / repeats * 1000)

    def _batch_s(self, work: Work, repeats: int, device: torch.device) -> float:
        """The slowest rank's time for so many, the same on every rank."""
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if self.waits:
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)


@dataclass(frozen=True, slots=True)
class _Table:
    """Points at every combination of some sizes, the last axis running fastest."""

    sizes: tuple[tuple[int, ...], ...]
    points: list[_Point]

    @property
    def times(self) -> TimeTable:
        """Their medians over the passes."""
        return TimeTable(sizes=self.sizes, ms=tuple(median(point.readings_ms) for point in self.points))


def _small_mlp(device: torch.device) -> Work:
    """`MLP_OPERATIONS` whose arithmetic is nothing beside their launch, forward, with all that backward needs."""
    modules = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
    mlp = nn.Sequential(*modules).to(device)
    state = torch.ones(8, 8, device=device)
    return lambda: state + mlp(state)


def _products(plan: CalibrationPlan, precision: Precision, device: torch.device) -> _Table:
    sizes = (plan.gemm_sizes,) * 3
    points = [_Point(partial(_product, *shape, precision, device)) for shape in product(*sizes)]
    return _Table(sizes, points)


def _product(rows: int, out: int, into: int, precision: Precision, device: torch.device) -> Work:
    """A linear layer's forward product, as the layer calls it."""
    inputs, weights = torch.randn(rows, into, device=device), torch.randn(out, into, device=device)
    if precision != "fp8":
        dtype = DTYPES[precision]
        inputs, weights = inputs.to(dtype), weights.to(dtype)
        return lambda: nn.functional.linear(inputs, weights)
    narrow, narrow_weights = inputs.to(torch.float8_e4m3fn), weights.to(torch.float8_e4m3fn).t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(narrow, narrow_weights, scale, scale, out_dtype=torch.bfloat16)


def _copy(moved_bytes: int, device: torch.device) -> Work:
    """Read half of it, write the other half to a tensor of its own, as activations do."""
    source = torch.ones(moved_bytes // 8, device=device)
    return lambda: source * 0.5


def _collectives(
    plan: CalibrationPlan, device: torch.device
) -> tuple[dict[Collective, _Table], dict[Collective, _Table]]:
    """Every kind in groups of neighbours, and in strided ones; a group of the whole world is both."""
    sizes = (group_sizes(dist.get_world_size()), plan.message_bytes)
    if not sizes[0]:
        return {}, {}
    neighbours = [_own_group(ranks, strided=False) for ranks in sizes[0]]
    strided = [_own_group(ranks, strided=True) for ranks in sizes[0][:-1]]

    def points(call: Call, groups: list[dist.ProcessGroup]) -> list[_Point]:
        return [_Point(partial(call, group, size, device)) for group in groups for size in plan.message_bytes]

    near = {kind: points(call, neighbours) for kind, call in CALLS.items()}
    worlds = {kind: both[-len(plan.message_bytes) :] for kind, both in near.items()}
    apart = {kind: points(call, strided) + worlds[kind] for kind, call in CALLS.items()}
    return (
        {kind: _Table(sizes, found) for kind, found in near.items()},
        {kind: _Table(sizes, found) for kind, found in apart.items()},
    )


def group_sizes(world_size: int) -> tuple[int, ...]:
    """The sizes of the groups that a world divides into, from 2."""
    return tuple(size for size in range(2, world_size + 1) if world_size % size == 0)


def groups_of(world_size: int, ranks: int, strided: bool) -> list[list[int]]:
    """The world in groups of so many ranks: neighbours, or as far apart as they can be."""
    count = world_size // ranks
    if strided:
        return [list(range(first, world_size, count)) for first in range(count)]
    return [list(range(first, first + ranks)) for first in range(0, world_size, ranks)]


def _own_group(ranks: int, strided: bool) -> dist.ProcessGroup:
    """This rank's; every rank must make all of them."""
    world_size, mine = dist.get_world_size(), None
    for members in groups_of(world_size, ranks, strided):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _buffers(group: dist.ProcessGroup, whole_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole of about so many bytes, and a rank's share of it."""
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
    """To the next rank, from the one before, with what the pipeline schedule calls."""
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a collective may be pending for ever, and its destructor would wait for it
