"""Samples of the machine are read in our units, summed up, and make a measurement suspect where it was disturbed."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.watch import ownership
from launchers.watch.meters import CpuReading, GpuReading, Sample, most_foreign_gib, read_gpu
from launchers.watch.ownership import OwnProcesses
from launchers.watch.sampling import MOST_SHARE, pause_s
from launchers.watch.telemetry import summarise, suspicions
from tuner.trial.contract import Phase, Telemetry

QUIET = GpuReading(
    clock_mhz=1980.0,
    power_w=640.0,
    energy_j=None,
    temperature_c=61.0,
    throttle_reasons=("SwPowerCap",),
    foreign_memory_gib=0.0,
)
GIB = 1024**3


def of_gpus(*readings: GpuReading, phase: Phase = "measure", time_s: float = 0.0) -> Sample:
    return Sample(time_s=time_s, phase=phase, gpus=readings)


def of_cpu(time_s: float, busy_s: float, own_s: float | None, phase: Phase = "measure") -> Sample:
    return Sample(time_s=time_s, phase=phase, cpu=CpuReading(clock_mhz=2600.0, busy_s=busy_s, own_s=own_s))


def test_only_the_timed_steps_count() -> None:
    hot = replace(QUIET, temperature_c=99.0, throttle_reasons=("HwThermalSlowdown",), clock_mhz=300.0)
    before = [of_gpus(hot, phase=phase) for phase in ("startup", "warmup", "teardown")]
    assert summarise(before, 100.0) is None
    telemetry = summarise([*before, of_gpus(QUIET)], 100.0)
    assert telemetry is not None
    assert (telemetry.samples, telemetry.temperature_c) == (1, 61.0)
    assert (telemetry.clock_mhz, telemetry.lowest_clock_mhz) == (1980.0, 1980.0)
    assert suspicions(telemetry, cores=16) == ()


def test_power_sums_over_all_gpus_and_energy_per_token_follows_from_the_rate() -> None:
    telemetry = summarise([of_gpus(QUIET, QUIET), of_gpus(QUIET, replace(QUIET, power_w=660.0))], 26_000.0)
    assert telemetry is not None
    assert telemetry.power_w == pytest.approx(1290.0)
    assert telemetry.energy_j_per_token == pytest.approx(1290.0 / 26_000)


def test_energy_counters_are_preferred_to_power_readings_which_lag() -> None:
    samples = [
        of_gpus(replace(QUIET, power_w=90.0, energy_j=1e6), time_s=10.0),
        of_gpus(replace(QUIET, power_w=500.0, energy_j=1e6 + 1400.0), time_s=12.0),
    ]
    telemetry = summarise(samples, None)
    assert telemetry is not None
    assert telemetry.power_w == pytest.approx(700.0)
    assert telemetry.energy_j_per_token is None
    blink = summarise([samples[0], replace(samples[1], time_s=10.1)], None)
    assert blink is not None
    assert blink.power_w == pytest.approx(295.0), "over so short a time the counter is too coarse"


def test_a_gpu_without_a_power_reading_leaves_the_sum_unknown() -> None:
    telemetry = summarise([of_gpus(QUIET, replace(QUIET, power_w=None))], 100.0)
    assert telemetry is not None
    assert telemetry.power_w is None


def test_foreign_load_is_the_load_beyond_our_own() -> None:
    samples = [of_cpu(0.0, 100.0, None), of_cpu(1.0, 102.0, 50.0), of_cpu(3.0, 106.0, 53.0)]
    telemetry = summarise([*samples, of_cpu(4.0, 108.0, None)], None)
    assert telemetry is not None
    assert telemetry.foreign_load == pytest.approx(((106 - 102) - (53 - 50)) / 2)
    assert telemetry.samples == 4
    assert telemetry.clock_mhz == 2600.0


@pytest.mark.parametrize("end_s", [1.0, 1.4])
def test_samples_over_a_short_time_give_no_load(end_s: float) -> None:
    telemetry = summarise([of_cpu(1.0, 102.0, 50.0), of_cpu(end_s, 103.0, 50.0)], None)
    assert telemetry is not None
    assert telemetry.foreign_load is None


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 1e6), st.none() | st.floats(0, 1e6)),
        max_size=8,
    )
)
def test_any_samples_can_be_summed_up(readings: list[tuple[float, float, float | None]]) -> None:
    samples = [of_cpu(*reading) for reading in sorted(readings, key=lambda reading: reading[0])]
    telemetry = summarise(samples, 1.0)
    assert (telemetry is None) is (not samples)
    if telemetry is not None:
        assert telemetry.foreign_load is None or telemetry.foreign_load >= 0
        assert len(suspicions(telemetry, 8)) <= 1


@pytest.mark.parametrize(
    ("disturbed", "line"),
    [
        (
            Telemetry(samples=3, throttle_reasons=("HwThermalSlowdown", "SwPowerCap"), temperature_c=92.4),
            "a GPU was throttled while steps were timed: HwThermalSlowdown, at up to 92 °C",
        ),
        (
            Telemetry(samples=3, throttle_reasons=("HwPowerBrakeSlowdown",)),
            "a GPU was throttled while steps were timed: HwPowerBrakeSlowdown",
        ),
        (
            Telemetry(samples=3, foreign_memory_gib=0.5),
            "other processes held 0.5 GiB of a GPU while steps were timed",
        ),
        (
            Telemetry(samples=3, foreign_load=1.7),
            "other processes kept 1.7 of 16 cores busy while steps were timed, more than 10%",
        ),
    ],
)
def test_a_disturbed_machine_makes_the_measurement_suspect(disturbed: Telemetry, line: str) -> None:
    assert suspicions(disturbed, cores=16) == (line,)


@pytest.mark.parametrize(
    "sound",
    [
        Telemetry(samples=3),
        Telemetry(samples=3, throttle_reasons=("SwPowerCap", "SyncBoost"), temperature_c=88.0),
        Telemetry(samples=3, foreign_memory_gib=0.03),
        Telemetry(samples=3, foreign_load=1.5),
    ],
)
def test_a_machine_at_its_usual_work_is_not_suspect(sound: Telemetry) -> None:
    assert suspicions(sound, cores=16) == ()


def raises(code: int) -> Callable[..., Any]:
    def ask(*arguments: Any) -> Any:
        raise pynvml.NVMLError(code)

    return ask


def nvml(**functions: Any) -> SimpleNamespace:
    """Return the functions of NVML as an H100 at work answers them, with those given in their place."""
    answers = {
        "nvmlDeviceGetPowerUsage": lambda handle: 641_250,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 91_234_567_890,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
        "nvmlDeviceGetClockInfo": lambda handle, kind: {pynvml.NVML_CLOCK_SM: 1755}[kind],
        "nvmlDeviceGetTemperature": lambda handle, sensor: {pynvml.NVML_TEMPERATURE_GPU: 64}[sensor],
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [process(OWN, 60.0)],
        "nvmlDeviceGetMPSComputeRunningProcesses": lambda handle: [],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [],
        "NVML_CLOCK_SM": pynvml.NVML_CLOCK_SM,
        "NVML_TEMPERATURE_GPU": pynvml.NVML_TEMPERATURE_GPU,
        "NVMLError": pynvml.NVMLError,
    }
    return SimpleNamespace(**answers | functions)


def process(pid: int, used_gib: float | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if used_gib is None else int(used_gib * GIB))


OWN, EARLIER = os.getpid(), 2**22 + 7
"""Ids of a process of the trial, and of one that used the GPU before the trial; no process has an id above 2^22."""
OWN_PROCESSES = OwnProcesses(Path("/night/trials/t0000"), (EARLIER,))


def test_every_function_that_is_used_exists_in_nvml() -> None:
    assert all(hasattr(pynvml, name) for name in vars(nvml()))


def test_a_gpu_is_read_in_our_units() -> None:
    assert read_gpu(nvml(), "handle", OWN_PROCESSES) == GpuReading(
        clock_mhz=1755,
        power_w=641.25,
        energy_j=91_234_567.89,
        temperature_c=64,
        throttle_reasons=("SwPowerCap",),
        foreign_memory_gib=0.0,
    )


LISTS = {"nvmlDeviceGetMPSComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"}


@pytest.mark.parametrize(
    "name", sorted({name for name in vars(nvml()) if name.startswith("nvmlDevice")} - LISTS)
)
def test_a_figure_that_a_gpu_lacks_is_left_out_and_the_rest_is_read(name: str) -> None:
    usual = read_gpu(nvml(), "handle", OWN_PROCESSES)
    reading = read_gpu(nvml(**{name: raises(pynvml.NVML_ERROR_NOT_SUPPORTED)}), "handle", OWN_PROCESSES)
    changed = [field for field in GpuReading.__slots__ if getattr(reading, field) != getattr(usual, field)]
    assert len(changed) == 1
    assert getattr(reading, changed[0]) in (None, ())


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0, ()),
        (pynvml.nvmlClocksThrottleReasonGpuIdle | pynvml.nvmlClocksThrottleReasonUserDefinedClocks, ()),
        (pynvml.nvmlClocksThrottleReasonHwSlowdown, ("HwSlowdown",)),
        (
            pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            ("SwThermalSlowdown", "HwThermalSlowdown"),
        ),
        (pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown, ("HwPowerBrakeSlowdown",)),
        (pynvml.nvmlClocksThrottleReasonSyncBoost, ("SyncBoost",)),
    ],
)
def test_throttle_reasons_have_nvmls_names_and_leave_out_harmless_ones(
    mask: int, reasons: tuple[str, ...]
) -> None:
    functions = nvml(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: mask)
    assert read_gpu(functions, "handle", OWN_PROCESSES).throttle_reasons == reasons


@pytest.mark.parametrize(
    ("processes", "foreign_gib"),
    [
        ([], None),
        ([process(OWN, 60.0)], 0.0),
        ([process(OWN, 60.0), process(8, 3.5), process(9, 0.5)], 4.0),
        ([process(OWN, 60.0), process(8, None)], 0.0),
        ([process(EARLIER, 3.5)], 3.5),
    ],
)
def test_foreign_memory_is_known_where_our_own_is_or_what_was_there_before(
    processes: list[Any], foreign_gib: float | None
) -> None:
    functions = nvml(nvmlDeviceGetComputeRunningProcesses=lambda handle: processes)
    assert read_gpu(functions, "handle", OWN_PROCESSES).foreign_memory_gib == foreign_gib


def test_in_a_container_only_what_was_there_before_is_known_to_be_foreign(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ownership, "sees_all_processes", lambda: False)
    hidden_rank, parent = process(2**22 + 8, 60.0), process(os.getppid(), 9.0)
    for processes, foreign_gib in (
        ([hidden_rank], None),
        ([hidden_rank, parent], None),
        ([hidden_rank, process(EARLIER, 3.5)], 3.5),
    ):
        functions = nvml(nvmlDeviceGetComputeRunningProcesses=lambda handle, listed=processes: listed)
        assert read_gpu(functions, "handle", OWN_PROCESSES).foreign_memory_gib == foreign_gib


def test_the_most_foreign_memory_is_told_for_each_gpu() -> None:
    silent, shared = replace(QUIET, foreign_memory_gib=None), replace(QUIET, foreign_memory_gib=5.0)
    assert most_foreign_gib([of_gpus(QUIET, silent), of_gpus(shared, silent)]) == (5.0, 0.0)
    assert most_foreign_gib([of_cpu(0.0, 1.0, None)]) == ()
    assert most_foreign_gib([]) == ()


@given(st.floats(0, 1e5), st.floats(0, 1.0), st.floats(1.0, 60.0))
def test_sampling_takes_no_more_than_its_share_of_a_core(
    since_s: float, cost_s: float, sparse_s: float
) -> None:
    for phase in ("build", "measure"):
        pause = pause_s(phase, since_s, cost_s, sparse_s)
        assert cost_s / pause <= MOST_SHARE * (1 + 1e-9)
        assert pause <= max(sparse_s, cost_s / MOST_SHARE)


def test_timed_steps_are_sampled_finely_at_first_and_then_as_sparsely_as_the_rest() -> None:
    assert pause_s("measure", 0.0, 0.0, 1.0) == pytest.approx(0.1)
    assert pause_s("measure", 10.0, 0.0, 1.0) == pytest.approx(0.5)
    assert pause_s("measure", 500.0, 0.0, 1.0) == 1.0
    assert pause_s("warmup", 0.0, 0.0, 1.0) == 1.0
