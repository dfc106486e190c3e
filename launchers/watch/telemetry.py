"""Sums up the samples of a trial over its timed steps, and says whether the machine was throttled or shared."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from launchers.watch.meters import Sample
from tuner.trial.contract import Telemetry

LEAST_WINDOW_S = 0.5
"""Load and power are averaged over at least this time, in seconds: the kernel counts a process's time in ticks of 10
ms."""
FOREIGN_MEMORY_GIB = 0.1
"""How much memory of a GPU other processes may use before the trial counts as disturbed. Assumed: less than the
smallest CUDA context, so that one other process on a GPU is noticed, and more than an MPS server uses."""
FOREIGN_LOAD = 0.1
"""The share of the cores that other processes may keep busy before the trial counts as disturbed. Assumed: the ranks
need all cores, so they lack what other processes take, and the daemons and kernel threads of an otherwise idle machine
take less than a tenth of this."""

_USUAL_REASONS = frozenset({"SwPowerCap", "SyncBoost"})
"""Throttle reasons that are harmless: a healthy machine runs large matrix products at its power limit, and SyncBoost
(GPUs that boost together) is a setting."""


def summarise(samples: Sequence[Sample], tokens_per_s: float | None) -> Telemetry | None:
    """Return the telemetry of a trial, summed up from the samples during its timed steps; None without such samples.

    `tokens_per_s` is the throughput of all GPUs together if the trial completed, otherwise None.
    """
    timed = [sample for sample in samples if sample.phase == "measure"]
    if not timed:
        return None
    readings = [gpu for sample in timed for gpu in sample.gpus]
    reasons = {reason for gpu in readings for reason in gpu.throttle_reasons}
    clocks = _stated(
        [gpu.clock_mhz for gpu in readings] + [sample.cpu.clock_mhz for sample in timed if sample.cpu]
    )
    power_w = _power_w(timed)
    return Telemetry(
        samples=len(timed),
        power_w=power_w,
        energy_j_per_token=power_w / tokens_per_s if power_w is not None and tokens_per_s else None,
        clock_mhz=fmean(clocks) if clocks else None,
        lowest_clock_mhz=min(clocks, default=None),
        temperature_c=max(_stated(gpu.temperature_c for gpu in readings), default=None),
        throttle_reasons=tuple(sorted(reasons)),
        foreign_memory_gib=max(_stated(gpu.foreign_memory_gib for gpu in readings), default=None),
        foreign_load=_foreign_load(timed),
    )


def suspicions(telemetry: Telemetry, cores: int, when: str = "while steps were timed") -> tuple[str, ...]:
    """Return why the measurement is not to be trusted, one line of text per reason; empty if there is no reason.

    Args:
        telemetry: The state of the machine during the measurement.
        cores: The number of cores that the ranks share.
        when: The time of the measurement, in words.
    """
    reasons = []
    if throttling := [name for name in telemetry.throttle_reasons if name not in _USUAL_REASONS]:
        heat = "" if telemetry.temperature_c is None else f", at up to {telemetry.temperature_c:.0f} °C"
        reasons.append(f"a GPU was throttled {when}: {', '.join(throttling)}{heat}")
    if (held_gib := telemetry.foreign_memory_gib) is not None and held_gib > FOREIGN_MEMORY_GIB:
        reasons.append(f"other processes held {held_gib:.1f} GiB of a GPU {when}")
    if (load := telemetry.foreign_load) is not None and load > FOREIGN_LOAD * cores:
        reasons.append(
            f"other processes kept {load:.1f} of {cores} cores busy {when}, more than {FOREIGN_LOAD:.0%}"
        )
    return tuple(reasons)


def _stated(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _power_w(timed: Sequence[Sample]) -> float | None:
    """Return the mean power of all GPUs together in W; None if a GPU does not report its power.

    It is computed from the energy counters if every GPU has one, else from the power readings, which lag by up to a
    second.
    """
    first_gpus, last_gpus = timed[0].gpus, timed[-1].gpus
    if not first_gpus:
        return None
    window_s = timed[-1].time_s - timed[0].time_s
    powers_by_energy = [
        (last.energy_j - first.energy_j) / window_s
        for first, last in zip(first_gpus, last_gpus, strict=True)
        if window_s >= LEAST_WINDOW_S and first.energy_j is not None and last.energy_j is not None
    ]
    if len(powers_by_energy) == len(first_gpus):
        return sum(powers_by_energy)
    powers = [[gpu.power_w for gpu in sample.gpus] for sample in timed]
    sums = [sum(_stated(of_gpus)) for of_gpus in powers if None not in of_gpus]
    return fmean(sums) if sums else None


def _foreign_load(timed: Sequence[Sample]) -> float | None:
    """Return how many cores other processes kept busy on average; None if the samples span too little time."""
    readings = [
        (sample.time_s, sample.cpu.busy_s, sample.cpu.own_s)
        for sample in timed
        if sample.cpu is not None and sample.cpu.own_s is not None
    ]
    if len(readings) < 2 or readings[-1][0] - readings[0][0] < LEAST_WINDOW_S:
        return None
    window_s, busy_s, own_s = (last - first for first, last in zip(readings[0], readings[-1], strict=True))
    return max(0.0, (busy_s - own_s) / window_s)
