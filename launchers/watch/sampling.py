"""Samples the machine in a thread while a trial runs, and writes the samples to the trial's folder."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pynvml

from launchers.watch.gpus import GpuSelection, driver
from launchers.watch.meters import CpuMeter, GpuMeter, Meter, Sample
from launchers.watch.ownership import OwnProcesses
from tuner.files import to_data
from tuner.trial.contract import Phase, TrialFolder

MOST_SAMPLES = 2000
"""Outside the timed steps, two samples are at least the trial's time limit / MOST_SAMPLES apart, so that their file
stays below 2 MB."""
MOST_SHARE = 0.01
"""The share of a core's time that sampling may take. Assumed: too little to change a step time."""
_SPARSE_S, _DENSE_S = 1.0, 0.1
"""The least time between two samples, in seconds: outside the timed steps, and at the beginning of the timed steps."""
_DENSE_SHARE = 0.05
"""During the timed steps, the next sample follows after this share of the time since they began."""
_TICK_S = 0.1
_END_S = 2.0
"""How long the thread may take to end, in seconds; a thread that waits for a broken GPU is left running."""


class Sampler:
    """Samples the machine in a thread of its own, since NVML may wait for a broken GPU for ever.

    Args:
        folder: The trial's folder, to which the samples are written.
        gpus: The GPUs of the trial; if it has none, the CPU is sampled.
        trial_s: The trial's time limit in seconds.
        phase: Returns the phase that the trial is in.
        own_processes: Tells the trial's processes from others; None if nothing is known of the time before the trial.
    """

    def __init__(
        self,
        folder: TrialFolder,
        gpus: GpuSelection,
        trial_s: float,
        phase: Callable[[], Phase],
        own_processes: OwnProcesses | None = None,
    ) -> None:
        self._folder, self._gpus, self._phase = folder, gpus, phase
        self._own_processes = own_processes or OwnProcesses(folder.path)
        self._sparse_s = max(_SPARSE_S, trial_s / MOST_SAMPLES)
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def end(self) -> tuple[Sample, ...]:
        """Stop sampling, and return all samples; it may be called again."""
        self._over.set()
        self._thread.join(_END_S)
        return tuple(self._samples)

    def _run(self) -> None:
        # Without a driver, or the right to ask it, the trial goes on without telemetry.
        with suppress(pynvml.NVMLError, psutil.Error, OSError):
            if not self._gpus.count:
                self._sample(CpuMeter(self._own_processes))
            else:
                self._sample(GpuMeter(driver().open(), self._gpus, self._own_processes))

    def _sample(self, meter: Meter) -> None:
        last_phase: Phase | None = None
        since_s = due_s = 0.0
        with self._folder.telemetry.open("w", encoding="utf-8") as file:
            while not self._over.wait(_TICK_S):
                phase, now_s = self._phase(), time.monotonic()
                if phase != last_phase:
                    last_phase, since_s, due_s = phase, now_s, now_s
                if now_s < due_s:
                    continue
                began_s = time.thread_time()
                sample = meter.read(phase)
                self._samples.append(sample)
                file.write(json.dumps(to_data(sample)) + "\n")
                file.flush()
                cost_s = time.thread_time() - began_s
                due_s = now_s + pause_s(phase, now_s - since_s, cost_s, self._sparse_s)


def pause_s(phase: Phase, since_s: float, cost_s: float, sparse_s: float) -> float:
    """Return the time until the next sample, in seconds.

    Args:
        phase: The trial's phase; during the timed steps, samples are more frequent at first.
        since_s: The time since the phase began, in seconds.
        cost_s: The CPU time of the last sample, in seconds: sampling takes at most MOST_SHARE of a core.
        sparse_s: The time between two samples outside the timed steps, in seconds.
    """
    fine_s = max(_DENSE_S, _DENSE_SHARE * since_s)
    wanted_s = min(fine_s, sparse_s) if phase == "measure" else sparse_s
    return max(wanted_s, cost_s / MOST_SHARE)
