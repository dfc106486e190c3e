"""Describes a machine with GPUs for the stand-ins, and builds NVIDIA's management library for it."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.cuda.standins import GPUS

SOURCE = Path(__file__).with_name("nvml.c")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretendedGpu:
    """A GPU, or a slice of one, as the driver describes it."""

    name: str
    number: int
    """The last digits of its UUID."""
    kind: str = "gpu"
    """`gpu`, `mig` for a slice of the GPU before it, or `lost` for a GPU that fell off the bus."""
    memory_mib: int = 81_559
    used_mib: int = 4
    nvlinks: int = 18
    processes: Mapping[int, int] = field(default_factory=dict)
    """MiB of this GPU in use by the process with this id."""

    @property
    def uuid(self) -> str:
        """Return the identifier that CUDA_VISIBLE_DEVICES may name."""
        return f"{'MIG' if self.kind == 'mig' else 'GPU'}-00000000-0000-0000-0000-{self.number:012d}"

    def line(self) -> str:
        """Return the GPU's line in the file that the stand-ins read."""
        processes = ",".join(f"{pid}:{mib}" for pid, mib in self.processes.items())
        return "|".join(
            map(
                str,
                (self.kind, self.name, self.uuid, self.memory_mib, self.used_mib, self.nvlinks, processes),
            )
        )


H100 = PretendedGpu(name="NVIDIA H100 80GB HBM3", number=0)
B200 = PretendedGpu(name="NVIDIA B200", number=0, memory_mib=183_359)
MIG_SLICE = PretendedGpu(
    name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", number=0, kind="mig", memory_mib=40_448, nvlinks=0
)


def eight(gpu: PretendedGpu) -> list[PretendedGpu]:
    """Return eight GPUs of one kind."""
    return [replace(gpu, number=number) for number in range(8)]


def write_machine(path: Path, gpus: Iterable[PretendedGpu]) -> None:
    """Write the file that the stand-ins read; it may be written again while they run."""
    beside = path.with_suffix(".new")
    beside.write_text("".join(f"{gpu.line()}\n" for gpu in gpus), encoding="ascii")
    beside.replace(path)


def build_nvml(folder: Path) -> Path:
    """Build the library into a folder, unless it is there; return the folder, for LD_LIBRARY_PATH.

    Raises:
        OSError: if there is no C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise OSError("the stand-in of NVML needs a C compiler as `cc`: install gcc")
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-O1", "-o", library, SOURCE], check=True)
    return folder


def environment(machine: Path, libraries: Path) -> dict[str, str]:
    """Return the variables by which a process sees the machine."""
    return {**os.environ, GPUS: str(machine), "LD_LIBRARY_PATH": str(libraries)}
