"""Compares this machine before and after a job: its GPUs' free memory, and the kernel's count of kills for memory."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.watch.gpus import GpuSelection, GpuUse, gpus_in_use, wait_for_release

_KILL_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Files of the kernel with a line `oom_kill N`: for the whole machine, and for our cgroup."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBefore:
    """The machine before a job starts; its methods compare it with the machine now."""

    gpus: GpuSelection
    """The GPUs that the job will use."""
    gpus_in_use: tuple[GpuUse, ...]
    oom_kills: int

    @classmethod
    def of(cls, gpu_count: int, visible_devices: str | None) -> "HostBefore":
        """Look at the machine.

        Args:
            gpu_count: How many GPUs the job will use; 0 on CPU.
            visible_devices: The job's CUDA_VISIBLE_DEVICES; None where it is not set.
        """
        selection = GpuSelection(gpu_count, visible_devices)
        return cls(gpus=selection, gpus_in_use=gpus_in_use(selection), oom_kills=host_oom_kills())

    def held_gpus(self) -> tuple[str, ...]:
        """Wait until the GPUs are as free as they were; return one line for each that is fuller after RELEASE_S."""
        return wait_for_release(self.gpus, self.gpus_in_use)

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
