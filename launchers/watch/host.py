"""Compares this machine before and after a job: its GPUs' free memory, and the kernel's count of kills for memory."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.watch.gpus import GpuSelection, GpuUse, driver, pids_of
from launchers.watch.meters import Sample, most_foreign_gib
from launchers.watch.ownership import OwnProcesses
from launchers.watch.release import GpusAfter, occupied, wait_for_release

_KILL_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Files of the kernel with a line `oom_kill N`: for the whole machine, and for our cgroup."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBefore:
    """The machine before a job starts; its methods compare it with the machine now."""

    gpus: GpuSelection
    """The GPUs that the job will use."""
    gpus_in_use: tuple[GpuUse, ...]
    """Empty if NVML did not answer."""
    oom_kills: int
    own_processes: OwnProcesses
    """Tells the job's processes from others, those that use its GPUs already among them."""

    @classmethod
    def of(cls, folder: Path, gpu_count: int, visible_devices: str | None) -> "HostBefore":
        """Look at the machine.

        Args:
            folder: The trial's folder.
            gpu_count: How many GPUs the job will use; 0 on CPU.
            visible_devices: The job's CUDA_VISIBLE_DEVICES; None where it is not set.
        """
        selection = GpuSelection(gpu_count, visible_devices)
        in_use = driver().uses(selection) or ()
        return cls(
            gpus=selection,
            gpus_in_use=in_use,
            oom_kills=host_oom_kills(),
            own_processes=OwnProcesses(folder, pids_of(in_use)),
        )

    def gpus_after(self) -> GpusAfter:
        """Wait until the GPUs are as free as they were, for at most RELEASE_S; return what differs then."""
        return wait_for_release(self.gpus_in_use, lambda: driver().uses(self.gpus), self.own_processes)

    def occupied_gpus(self, after: GpusAfter, samples: Sequence[Sample]) -> tuple[str, ...]:
        """Return one line of text for each GPU of which others held memory before, during or after the job."""
        return occupied(self.gpus_in_use, after.uses, most_foreign_gib(samples))

    def oom_kills_since(self) -> int:
        """Return how many processes the kernel has killed for memory since `of` looked.

        The kernel counts for the whole machine, so a kill in another trial is counted here too. That
        does no harm: the count is used only if a process of this trial died of SIGKILL as well.
        """
        return host_oom_kills() - self.oom_kills


def host_oom_kills() -> int:
    """Return how many processes the kernel has killed for memory so far; 0 where it does not say."""
    kills = 0
    for counters in _KILL_COUNTERS:
        with suppress(OSError):
            lines = (line.split() for line in counters.read_text(encoding="ascii").splitlines())
            kills += sum(int(line[1]) for line in lines if line[0] == "oom_kill")
    return kills
