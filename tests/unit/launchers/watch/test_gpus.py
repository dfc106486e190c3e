"""NVML is asked for the memory of any GPUs, however slow it is and whatever it does not say."""

from types import SimpleNamespace

import pynvml
import pytest

from launchers.watch.gpus import Driver, GpuProcess, GpuSelection, GpuUse, visible
from tests.pretended_nvml import Gpu, PretendedNvml

EIGHT = GpuSelection(8)


def eight(**first: object) -> list[Gpu]:
    """Return eight GPUs of several kinds; the first has the given properties."""
    kinds = [80.0] * 4 + [180.0] * 2 + [24.0] * 2
    gpus = [Gpu(uuid=f"GPU-{index}a2b", total_gib=gib) for index, gib in enumerate(kinds)]
    for name, value in first.items():
        setattr(gpus[0], name, value)
    return gpus


def use_of(nvml: PretendedNvml, visible_devices: str | None = None) -> GpuUse:
    """Return what is told of the first visible GPU."""
    uses = Driver(nvml).uses(GpuSelection(1, visible_devices))
    assert uses is not None
    return uses[0]


def test_each_gpu_is_described_with_its_memory_and_its_processes() -> None:
    uses = Driver(PretendedNvml(eight(used_gib=20.0, computing={77: 19.5}))).uses(EIGHT)
    assert uses is not None
    assert [use.total_gib for use in uses] == [80.0] * 4 + [180.0] * 2 + [24.0] * 2
    assert uses[0] == GpuUse(name="0", used_gib=20.0, total_gib=80.0, processes=(GpuProcess(77, 19.5),))
    assert uses[1].processes == ()


def test_nvml_is_opened_once_and_stays_open() -> None:
    nvml = PretendedNvml(eight())
    driver = Driver(nvml)
    for _ in range(3):
        assert driver.uses(EIGHT)
    assert driver.open() is nvml
    assert nvml.opened == 1
    assert not hasattr(nvml, "nvmlShutdown")


def test_the_first_answer_may_take_as_long_as_eight_gpus_need_to_wake() -> None:
    driver = Driver(PretendedNvml(eight(), open_s=0.5), open_s=10.0, answer_s=0.2)
    uses = driver.uses(EIGHT)
    assert uses is not None and len(uses) == 8


def test_a_driver_that_does_not_answer_in_time_says_nothing_and_is_asked_again() -> None:
    nvml = PretendedNvml(eight())
    driver = Driver(nvml, answer_s=0.2)
    assert driver.uses(EIGHT)
    nvml.answer_s = 0.5
    assert driver.uses(EIGHT) is None
    nvml.answer_s = 0.0
    assert driver.uses(EIGHT)


def test_without_a_driver_or_without_gpus_there_is_nothing_to_tell() -> None:
    class NoDriver(PretendedNvml):
        def nvmlInit(self) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    assert Driver(NoDriver(eight())).uses(EIGHT) == ()
    nvml = PretendedNvml(eight())
    assert Driver(nvml).uses(GpuSelection(0)) == ()
    assert nvml.opened == 0, "a sweep on CPU does not open NVML"


def test_a_slice_is_found_by_its_identifier_and_a_gpu_by_the_beginning_of_its_own() -> None:
    nvml = PretendedNvml(eight(), [Gpu(uuid="MIG-7c1", total_gib=40.0, used_gib=1.0)])
    assert use_of(nvml, "MIG-7c1").total_gib == 40.0
    assert use_of(nvml, "GPU-4a").total_gib == 180.0
    assert use_of(nvml, "GPU-4a").name == "GPU-4a"


def test_a_gpu_that_is_cut_into_slices_may_keep_its_memory_to_itself() -> None:
    use = use_of(PretendedNvml(eight(error=pynvml.NVML_ERROR_NO_PERMISSION)))
    assert (use.used_gib, use.fault) == (None, "Insufficient Permissions")


def test_a_lost_gpu_does_not_hide_the_others() -> None:
    uses = Driver(PretendedNvml(eight(error=pynvml.NVML_ERROR_GPU_IS_LOST))).uses(EIGHT)
    assert uses is not None
    assert [use.fault for use in uses] == ["GPU is lost"] + [""] * 7


def test_an_old_driver_counts_its_reserve_as_used() -> None:
    refuses = {"nvmlDeviceGetMemoryInfo_v2": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    use = use_of(PretendedNvml(eight(used_gib=20.0, refuses=refuses)))
    assert use.used_gib == pytest.approx(20.6)
    assert use.counts_reserve


def test_processes_under_mps_and_those_that_draw_are_found_too() -> None:
    gpus = eight(computing={5: 0.25}, under_mps={6: 60.0, 7: None}, drawing={5: 0.125, 8: 0.5})
    assert set(use_of(PretendedNvml(gpus)).processes) == {
        GpuProcess(5, 0.25),
        GpuProcess(6, 60.0),
        GpuProcess(7, None),
        GpuProcess(8, 0.5),
    }


def test_processes_that_may_not_be_listed_leave_the_memory_told() -> None:
    refuses = {"nvmlDeviceGetComputeRunningProcesses": pynvml.NVML_ERROR_NO_PERMISSION}
    use = use_of(PretendedNvml(eight(used_gib=3.0, computing={5: 3.0}, refuses=refuses)))
    assert (use.used_gib, use.processes) == (3.0, ())


def test_a_driver_that_knows_nothing_of_mps_leaves_the_other_processes_told() -> None:
    class Old(PretendedNvml):
        def nvmlDeviceGetMPSComputeRunningProcesses(self, gpu: Gpu) -> list[SimpleNamespace]:
            raise pynvml.NVMLLibraryMismatchError("Unversioned function called")

    assert use_of(Old(eight(computing={5: 3.0}, drawing={6: 0.5}))).processes == (
        GpuProcess(5, 3.0),
        GpuProcess(6, 0.5),
    )


@pytest.mark.parametrize(
    ("selected", "names"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("2, 0", ["2", "0"]),
        ("GPU-8f2a,MIG-7c1", ["GPU-8f2a", "MIG-7c1"]),
        ("1,-1,0", ["1"]),
        ("1,3,0", ["1"]),
        ("NoDevFiles", []),
    ],
)
def test_only_the_gpus_that_cuda_shows_a_job_are_asked_for(selected: str | None, names: list[str]) -> None:
    assert visible(selected, 3) == names
