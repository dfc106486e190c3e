"""Runs any command as a trial: `python -m launchers.programs.command SPEC.json FOLDER COMMAND...`.

The command's output is passed on, and step times, losses and peak memory are read from it with the regular expressions
of the spec. A command whose spec has no expressions writes `result.json` itself. The command may start any processes;
the launcher ends them all.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from launchers.programs.harness.failures import NonFiniteLossError, report_failure
from launchers.programs.harness.measure import slower_than_ms
from launchers.programs.harness.monitor import Monitor
from launchers.programs.harness.results import PeakGib, Steps, rank_record, write_completed, write_too_slow
from tuner.files import read_json
from tuner.trial.contract import TrialFolder, TrialSpec
from tuner.trial.program import Command, LogFigures, MegatronLm, read_log


def main(arguments: list[str]) -> int:
    """Run the trial; return the exit code, which is the command's own if it failed.

    `arguments` are the path of the spec, the trial's folder, and the command with its arguments.
    """
    spec, folder = read_json(TrialSpec, Path(arguments[0])), TrialFolder(Path(arguments[1]))
    assert isinstance(spec.program, Command | MegatronLm), "the launcher runs this program for commands alone"
    monitor = Monitor(folder, 0, float(os.environ.get("MEGATUNE_STARTED_AT", time.time())))
    with subprocess.Popen(
        arguments[2:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        log = _Log(spec, monitor, spec.program)
        above_ms = log.follow(_lines(process))
        if above_ms is not None:
            process.send_signal(signal.SIGTERM)
            write_too_slow(spec, monitor, above_ms, [rank_record(monitor, log.peak)])
            os._exit(0)  # the launcher ends whatever still runs
        code = process.wait()
    if code:
        if code < 0:  # end this process by the same signal, so that the launcher sees it
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        return code
    try:
        log.conclude()
    except Exception as error:
        report_failure(monitor, error, log.peak)
        return 1
    return 0


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Yield the lines of the command's output, after each has been written to this process's own output."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        yield line.decode(errors="replace")


class _Log:
    """What the output has reported so far: step times, losses, gradient norms and peak memory."""

    def __init__(self, spec: TrialSpec, monitor: Monitor, program: Command | MegatronLm) -> None:
        self.spec, self.monitor, self.patterns = spec, monitor, program.patterns
        self.times_ms: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.peak: PeakGib = (None, None)

    def follow(self, lines: Iterator[str]) -> float | None:
        """Read the output to its end, or until the trial can be given up because it is too slow.

        Returns:
            A lower bound of the trial's step time in ms, if it exceeds what the spec allows; None if the output ended.
        """
        for line in lines:
            figures = read_log(line, self.patterns)
            self._take(figures)
            timed_ms = self.times_ms[self.spec.measurement.warmup_steps :]
            above_ms = slower_than_ms(timed_ms, self.spec) if figures.step_time_ms else None
            if above_ms is not None:
                return above_ms
        return None

    def _take(self, figures: LogFigures) -> None:
        self.losses += figures.loss
        self.grad_norms += figures.grad_norm
        allocated, reserved = self.peak
        self.peak = (
            _larger(allocated, figures.peak_allocated_gib),
            _larger(reserved, figures.peak_reserved_gib),
        )
        least = self.spec.measurement.warmup_steps
        for time_ms in figures.step_time_ms:
            self.times_ms.append(time_ms)
            if len(self.times_ms) in {1, least}:
                self.monitor.enter("warmup" if len(self.times_ms) < least else "measure")
            self.monitor.finish_step()

    def conclude(self) -> None:
        """Write the result, unless the command writes it itself.

        Raises:
            NonFiniteLossError: if a loss is not finite.
            EOFError: if the output ended with too few steps or no peak memory, or the command wrote no result itself.
        """
        if not self.patterns:
            if not self.monitor.folder.result.exists():
                raise EOFError(
                    f"the command wrote no {self.monitor.folder.result.name}, and program.log names no figures"
                )
            return
        if not all(map(isfinite, self.losses)):
            raise NonFiniteLossError(f"losses {self.losses}")
        needed = self.spec.measurement.warmup_steps + self.spec.measurement.min_steps
        if len(self.times_ms) < needed or self.peak[0] is None:
            peak = "no peak memory" if self.peak[0] is None else "a peak memory"
            raise EOFError(
                f"the output states {len(self.times_ms)} step times and {peak}; needed are {needed} step times "
                "(measurement: warmup_steps + min_steps) and a peak memory"
            )
        self.monitor.enter("teardown")
        steps = Steps(tuple(self.times_ms), tuple(self.losses), tuple(self.grad_norms))
        write_completed(self.spec, self.monitor, steps, [rank_record(self.monitor, self.peak)])


def _larger(first: float | None, second: float | None) -> float | None:
    return max((value for value in (first, second) if value is not None), default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
