"""Samples the machine in a thread beside a trial, into the trial's folder."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pynvml

from launchers.watch.gpus import GpuSelection
from launchers.watch.meters import CpuMeter, GpuMeter, Meter, OwnProcesses, Sample
from tuner.files import to_data
from tuner.trial.contract import Phase, TrialFolder

MOST_SAMPLES = 2000
"""How many samples a trial's time limit is divided into, so that their file stays below 2 MB."""
MOST_SHARE = 0.01
"""The share of a core that sampling may take. Assumed: too little to change a step time."""
_SPARSE_S, _DENSE_S = 1.0, 0.1
"""The least seconds between two samples: outside the timed steps, and at their beginning."""
_DENSE_SHARE = 0.05
"""During the timed steps, the next sample comes after this share of the time since they began."""
_TICK_S = 0.1
_END_S = 2.0
"""How long the thread gets to end; a thread that waits for a broken GPU is left behind."""


class Sampler:
    """Samples in a thread of its own, since NVML may wait for a broken GPU for ever.

    Args:
        folder: The trial's folder, where the samples are kept.
        gpus: The GPUs of the trial; where it has none, the CPU is sampled.
        trial_s: The trial's time limit.
        phase: Returns the phase that the trial is in.
    """

    def __init__(
        self, folder: TrialFolder, gpus: GpuSelection, trial_s: float, phase: Callable[[], Phase]
    ) -> None:
        self._folder, self._gpus, self._phase = folder, gpus, phase
        self._sparse_s = max(_SPARSE_S, trial_s / MOST_SAMPLES)
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def end(self) -> tuple[Sample, ...]:
        """Stop sampling, and return the samples; may be called again."""
        self._over.set()
        self._thread.join(_END_S)
        return tuple(self._samples)

    def _run(self) -> None:
        own_processes = OwnProcesses(self._folder.path)
        # Without a driver, or the right to ask it, the trial goes on without telemetry.
        with suppress(pynvml.NVMLError, psutil.Error, OSError):
            if not self._gpus.count:
                self._sample(CpuMeter(own_processes))
                return
            pynvml.nvmlInit()
            try:
                self._sample(GpuMeter(self._gpus, own_processes))
            finally:
                pynvml.nvmlShutdown()

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
    """Return the seconds until the next sample.

    Args:
        phase: The trial's phase: the timed steps are sampled finely at first.
        since_s: The time since the phase began.
        cost_s: The CPU time of the last sample: sampling takes at most MOST_SHARE of a core.
        sparse_s: The time between two samples outside the timed steps.
    """
    fine_s = max(_DENSE_S, _DENSE_SHARE * since_s)
    wanted_s = min(fine_s, sparse_s) if phase == "measure" else sparse_s
    return max(wanted_s, cost_s / MOST_SHARE)
