"""Runs Python code in a process of its own that sees a described machine."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cuda.gpus import PretendedGpu, build_nvml, environment, write_machine
from tests.cuda.standins import ASKED

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


class Machine:
    """A machine with GPUs, and the processes that see it.

    Args:
        folder: A folder for its files.
        gpus: Its GPUs.
        variables: Further environment variables of the processes.
    """

    def __init__(
        self, folder: Path, gpus: Sequence[PretendedGpu], variables: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self._asked = folder, folder / "asked.txt"
        self.errors = ""
        """The standard error of the last code that ran."""
        write_machine(folder / "machine.txt", gpus)
        self.environment = {
            **environment(folder / "machine.txt", build_nvml(folder)),
            ASKED: str(self._asked),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **(variables or {}),
        }

    def run(self, code: str, *arguments: str) -> str:
        """Run code; return its standard output, and fail if its exit code is not 0."""
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        self.errors = ended.stderr
        assert ended.returncode == 0, ended.stderr[-4000:]
        return ended.stdout

    def told(self, code: str, *arguments: str) -> Any:
        """Run code whose last line of output is JSON; return the data."""
        return json.loads(self.run(code, *arguments).splitlines()[-1])

    def questions(self) -> list[tuple[int, str]]:
        """Return each question to CUDA for the number of GPUs: the process's id, and its functions, innermost first."""
        if not self._asked.exists():
            return []
        lines = self._asked.read_text(encoding="utf-8").splitlines()
        return [(int(pid), stack) for pid, _, stack in (line.partition(" ") for line in lines)]
