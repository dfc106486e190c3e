"""Compares the memory of GPUs before and after a job: whether the job gave it back, and what others held of it."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from launchers.watch.gpus import GpuUse
from launchers.watch.ownership import OwnProcesses, sees_all_processes

RELEASE_S: Final = 30.0
"""How long the driver may take to free the memory of ended processes, in seconds. Assumed."""
TOLERANCE_GIB: Final = 0.25
"""The growth of a GPU's memory in use, from before a job to after it, that counts as released. Assumed: more than the
driver's own state takes."""
OCCUPIED_SHARE: Final = 0.01
"""The share of a GPU's memory that others may hold while an out-of-memory still counts. Assumed: a display or an MPS
server takes less, and the prediction of a layout's memory is not more exact."""
_POLL_S: Final = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpusAfter:
    """The GPUs after a job, compared with before; `held` and `unclear` have one line of text per GPU."""

    held: tuple[str, ...] = ()
    """GPUs that are lost, or that have more memory in use than processes of others explain."""
    unclear: tuple[str, ...] = ()
    """GPUs that have more memory in use, in a container that hides whose processes hold it."""
    uses: tuple[GpuUse, ...] = ()
    """The GPUs at the last look; empty if NVML did not answer."""


def wait_for_release(
    before: Sequence[GpuUse],
    look: Callable[[], tuple[GpuUse, ...] | None],
    own: OwnProcesses,
    limit_s: float = RELEASE_S,
) -> GpusAfter:
    """Wait until the GPUs are as free as in `before`, for at most about `limit_s` seconds.

    Args:
        before: The GPUs before the job; empty if nothing is known.
        look: Returns the GPUs now, in the order of `before`; None if NVML does not answer in time.
        own: Tells the job's processes, all of which have ended, from others.
        limit_s: The longest wait in seconds; the last answer may come later.
    """
    deadline_s = time.monotonic() + limit_s
    while before:
        uses = look()
        after = None if uses is None else _compared(before, uses, own)
        if after is not None and not after.held and not after.unclear:
            return after
        if time.monotonic() > deadline_s:
            if after is None:
                _log.warning("NVML does not answer: it is not known whether the GPUs are as free as before")
            return after or GpusAfter()
        time.sleep(_POLL_S)
    return GpusAfter()


def _compared(before: Sequence[GpuUse], uses: tuple[GpuUse, ...], own: OwnProcesses) -> GpusAfter:
    lost, grown = _lost(before, uses), _grown(before, uses, own)
    if sees_all_processes():
        return GpusAfter(held=(*lost, *grown), uses=uses)
    return GpusAfter(held=lost, unclear=grown, uses=uses)


def occupied(
    before: Sequence[GpuUse], after: Sequence[GpuUse], others_gib: Sequence[float]
) -> tuple[str, ...]:
    """Return one line of text for each GPU of which others held more than OCCUPIED_SHARE before, during or after a job.

    Args:
        before: The GPUs before the job.
        after: The same GPUs when all the job's processes have ended; empty if they are not known.
        others_gib: The most memory of each GPU that others were seen to hold while the job ran; empty if nothing was.
    """
    lines = []
    for index, earlier in enumerate(before):
        uses = (earlier, *after[index : index + 1])
        most_gib = max(*map(_held_gib, uses), *others_gib[index : index + 1], 0.0)
        if earlier.total_gib and most_gib > OCCUPIED_SHARE * earlier.total_gib:
            pids = dict.fromkeys(process.pid for use in uses for process in use.processes)
            lines.append(f"others held {most_gib:.2f} GiB of GPU {earlier.name} ({_named(pids)})")
    return tuple(lines)


def _lost(before: Sequence[GpuUse], now: Sequence[GpuUse]) -> tuple[str, ...]:
    """Return one line of text for each GPU that NVML told of before, and now does not."""
    if not now:
        return ("NVML finds no driver any more",)
    return tuple(
        f"GPU {after.name} no longer answers ({after.fault})"
        for earlier, after in zip(before, now, strict=False)
        if after.fault and not earlier.fault
    )


def _grown(before: Sequence[GpuUse], now: Sequence[GpuUse], own: OwnProcesses) -> tuple[str, ...]:
    """Return one line of text for each GPU that has more memory in use than the processes of others explain."""
    return tuple(
        f"GPU {after.name} holds {after.used_gib:.2f} GiB, {earlier.used_gib:.2f} GiB before the trial "
        f"({_named(process.pid for process in after.processes)})"
        for earlier, after in zip(before, now, strict=False)
        if earlier.used_gib is not None
        and after.used_gib is not None
        and after.used_gib - earlier.used_gib - _grown_gib(earlier, after, own) > TOLERANCE_GIB
    )


def _grown_gib(before: GpuUse, now: GpuUse, own: OwnProcesses) -> float:
    """Return by how much the memory has grown that processes of others use; infinite if one does not say how much."""
    earlier_gib = {process.pid: process.used_gib for process in before.processes}
    grown_gib = 0.0
    for process in now.processes:
        if own.excludes(process.pid):
            if process.used_gib is None:
                return float("inf")
            grown_gib += max(0.0, process.used_gib - (earlier_gib.get(process.pid) or 0.0))
    return grown_gib


def _held_gib(use: GpuUse) -> float:
    """Return the memory that is in use, without what the driver keeps for itself."""
    if use.used_gib is None or use.counts_reserve:
        return sum(process.used_gib or 0.0 for process in use.processes)
    return use.used_gib


def _named(pids: Iterable[int]) -> str:
    return f"processes: {', '.join(map(str, pids)) or 'none that the driver names'}"
