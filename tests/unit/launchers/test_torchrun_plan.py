"""What a torchrun launcher would do, decided without doing it; and the limits and logs that it watches."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import inherited_environment
from launchers.watch import logs
from launchers.watch.limits import LEAST_SILENCE_S, SILENT_STEPS, Clock, Ending
from tests.trials import CLUSTER, spec_of
from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import parse
from tuner.trial.contract import Heartbeat, Limits, TrialFolder, TrialSpec

CPU = replace(CLUSTER, device="cpu", gpus_per_node=4)
FOLDER = TrialFolder(Path("/nowhere/a 'night'/t0000"))


def test_planning_touches_nothing_and_starts_one_rank_a_gpu(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "t0000")
    plan = TorchrunLauncher().plan(spec_of(0, Layout()), folder)
    assert not folder.path.exists()
    assert "--nproc-per-node=8" in plan.argv
    assert plan.argv[-3:] == ("launchers.programs.megatron_core", str(folder.spec), str(folder.path))


def test_the_plan_holds_the_whole_spec() -> None:
    spec = spec_of(3, Layout(tp=2, sp=True))
    plan = TorchrunLauncher().plan(spec, FOLDER)
    assert parse(TrialSpec, json.loads(plan.files["spec.json"]), "plan") == spec


def test_the_plan_is_the_same_each_time_and_plain_data() -> None:
    launcher, spec = TorchrunLauncher(), spec_of(0, Layout())
    data = launcher.plan(spec, FOLDER).to_data()
    assert data == launcher.plan(spec, FOLDER).to_data()
    assert json.loads(json.dumps(data)) == data


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1))
def test_a_shell_reads_the_command_back_as_planned_whatever_the_folder_is_called(name: str) -> None:
    plan = TorchrunLauncher().plan(spec_of(0, Layout()), TrialFolder(Path("/results", name)))
    words = shlex.split(plan.shell_command())
    variables = [f"{key}={value}" for key, value in plan.env.items()]
    assert words == ["cd", str(plan.folder), "&&", "env", *variables, *plan.argv]


def test_several_nodes_are_refused_with_the_figure() -> None:
    cluster = replace(CLUSTER, nodes=2)
    with pytest.raises(InputError, match=r"'test-cluster': nodes = 2, but the torchrun launcher"):
        TorchrunLauncher().plan(spec_of(0, Layout(), cluster=cluster), FOLDER)


def test_an_unknown_program_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r"'megatron-core' \(did you mean 'megatron_core'\?\)"):
        TorchrunLauncher().plan(replace(spec_of(0, Layout()), program="megatron-core"), FOLDER)


@pytest.mark.parametrize(
    ("cluster", "cores", "threads"), [(CPU, 2, "1"), (CPU, 4, "1"), (CPU, 16, "4"), (CLUSTER, 64, "1")]
)
def test_cpu_ranks_share_the_cores(cluster: Cluster, cores: int, threads: str) -> None:
    plan = TorchrunLauncher(cores=cores).plan(spec_of(0, Layout(), cluster=cluster), FOLDER)
    assert plan.env["OMP_NUM_THREADS"] == threads


def test_only_cuda_jobs_get_the_variables_of_cuda() -> None:
    launcher, layout = TorchrunLauncher(), Layout(tp=2)
    assert launcher.plan(spec_of(0, layout), FOLDER).env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in launcher.plan(spec_of(0, layout, cluster=CPU), FOLDER).env


@pytest.mark.parametrize(
    ("gpu", "layout", "connections"),
    [
        ("H100", Layout(), "8"),
        ("H100", Layout(tp=2), "1"),
        ("A100-SXM4-80GB", Layout(cp=2), "1"),
        ("H100", Layout(tp=2, ep=2, overlap_moe_expert_parallel_comm=True), "8"),
        ("H100", Layout(tp=2, ep=2, moe_token_dispatcher_type="flex"), "1"),
        ("H100", Layout(ep=2, moe_token_dispatcher_type="flex"), "32"),
        ("NVIDIA B200", Layout(tp=2), "32"),
        ("GB300", Layout(), "32"),
        ("VR200", Layout(tp=2), "32"),
    ],
)
def test_the_hardware_queues_follow_the_gpu_and_its_overlaps(
    gpu: str, layout: Layout, connections: str
) -> None:
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, name=gpu))
    assert cuda_environment(layout, cluster)["CUDA_DEVICE_MAX_CONNECTIONS"] == connections


@pytest.mark.parametrize(("ep", "ranks"), [(4, "4"), (16, "8")])
def test_flexible_dispatch_is_told_its_ranks_of_an_nvlink_domain(ep: int, ranks: str) -> None:
    assert CLUSTER.nvlink_domain_gpus == 8
    name = "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"
    flexible = Layout(ep=ep, moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
    assert cuda_environment(flexible, CLUSTER)[name] == ranks
    assert name not in cuda_environment(replace(flexible, moe_flex_dispatcher_backend="deepep"), CLUSTER)
    assert name not in cuda_environment(Layout(ep=ep), CLUSTER)


def test_the_users_own_python_path_stays_and_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/opt/megatron:relative")
    entries = TorchrunLauncher().plan(spec_of(0, Layout()), FOLDER).env["PYTHONPATH"].split(":")
    assert entries[-2:] == ["/opt/megatron", str(Path("relative").absolute())]


def test_what_the_job_inherits_is_not_recorded_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    plan = TorchrunLauncher().plan(spec_of(0, Layout()), FOLDER)
    assert inherited_environment()["HF_TOKEN"] == "hf_do_not_write_me"  # the job itself has it
    assert "do_not_write_me" not in json.dumps([plan.to_data(), *plan.files.values()])
    assert "HF_TOKEN" not in plan.shell_command()


def test_another_torchruns_variables_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    monkeypatch.setenv("PET_NNODES", "4")
    assert not {"TORCHELASTIC_RUN_ID", "PET_NNODES"} & set(inherited_environment())


def test_only_a_cuda_job_is_to_give_gpus_back() -> None:
    launcher = TorchrunLauncher()
    assert launcher.plan(spec_of(0, Layout()), FOLDER).gpus == 8
    assert launcher.plan(spec_of(0, Layout(), cluster=CPU), FOLDER).gpus == 0


LIMITS = Limits(startup_s=10.0, step_s=5.0, trial_s=100.0)


LONG = Limits(startup_s=600.0, step_s=300.0, trial_s=100_000.0)


def clock(step: int | None, seen_s: float) -> Clock:
    clock = Clock(LIMITS, started_s=1000.0)
    if step is not None:
        clock.beat(Heartbeat(phase="measure", step=step, time_s=0.0), seen_s)
    return clock


@pytest.mark.parametrize(
    ("step", "seen_s", "now_s", "passed"),
    [
        (None, 0.0, 1010.0, None),
        (None, 0.0, 1010.1, "startup"),
        (0, 1009.0, 1010.1, "startup"),  # a heartbeat before the first step ended does not stretch the start
        (1, 1009.0, 1014.0, None),
        (1, 1009.0, 1014.1, "step"),
        (7, 1099.0, 1100.1, "trial"),
    ],
)
def test_a_limit_is_passed_only_after_its_time(
    step: int | None, seen_s: float, now_s: float, passed: Ending | None
) -> None:
    assert clock(step, seen_s).passed(now_s) == passed


def test_a_heartbeat_seen_again_is_no_sign_of_life() -> None:
    watch = clock(1, 1009.0)
    assert not watch.beat(Heartbeat(phase="measure", step=1, time_s=0.0), 1013.0)
    assert watch.passed(1014.1) == "step"
    assert watch.beat(Heartbeat(phase="measure", step=2, time_s=0.0), 1014.1)
    assert watch.passed(1014.2) is None


def test_logs_within_their_limit_are_left_whole(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"x" * (2 << 20))
    assert logs.bound(tmp_path, 3 << 20) == {}
    assert (tmp_path / "a.log").stat().st_size == 2 << 20


@pytest.mark.parametrize("after_the_cut", [b"", b" and newest"])
def test_a_log_cut_under_its_writer_keeps_the_first_and_the_newest_output(
    after_the_cut: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "rank" / "stdout.log"
    path.parent.mkdir()
    with path.open("wb", buffering=0) as writer:
        writer.write(b"first" + b"x" * (8 << 20) + b"new")
        cut = logs.bound(tmp_path, 4 << 20)
        writer.write(after_the_cut)
        assert path.stat().st_blocks * 512 < 4 << 20
    assert list(cut) == [path]
    logs.close_gap(path, cut[path])
    text = path.read_bytes()
    assert text.startswith(b"firstx") and text.endswith(b"xnew" + after_the_cut)
    assert b"\0" not in text and len(text) < 3 << 20


def test_the_tail_of_what_is_no_text_or_not_there_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"\xff\xfe broken")
    assert logs.tail(tmp_path / "a.log").endswith(" broken")
    assert logs.tail(tmp_path / "missing.log") == ""


def test_the_steps_seen_bound_the_step_time_from_below() -> None:
    clock = Clock(LIMITS, started_s=1000.0)
    assert clock.slower_than_ms(1004.0) is None, "nothing is known before the first step"
    for step, now_s in ((0, 1001.0), (1, 1003.0), (2, 1005.0), (3, 1007.0)):
        clock.beat(Heartbeat(phase="warmup", step=step, time_s=now_s), now_s)
    # Two steps took four seconds, and the third is not done after three more.
    assert clock.slower_than_ms(1010.0) == pytest.approx(7000 / 3)


def stepping(step_s: float, steps: int, limits: Limits = LONG) -> tuple[Clock, float]:
    """A clock that saw the first step, and `steps` more of the same length; and the time then."""
    clock, now_s = Clock(limits, started_s=0.0), 100.0
    for step in range(1, steps + 2):
        clock.beat(Heartbeat(phase="measure", step=step, time_s=0.0), now_s)
        now_s += step_s
    return clock, now_s - step_s


@pytest.mark.parametrize(
    ("step_s", "steps", "silence_s"),
    [
        (2.0, 2, LONG.step_s),  # too few steps to know: the next may compile an expert for the first time
        (2.0, 3, SILENT_STEPS * 2.0),
        (0.1, 50, LEAST_SILENCE_S),
        (60.0, 3, LONG.step_s),
    ],
)
def test_the_silence_that_is_a_hang_follows_the_steps_once_they_are_known(
    step_s: float, steps: int, silence_s: float
) -> None:
    clock, now_s = stepping(step_s, steps)
    assert clock.silence_s == pytest.approx(silence_s)
    assert clock.passed(now_s + silence_s - 0.01) is None
    assert clock.passed(now_s + silence_s + 0.01) == "step"


def test_the_slowest_step_counts_and_a_phase_between_two_steps_is_part_of_one() -> None:
    clock, now_s = stepping(2.0, 3)
    clock.beat(Heartbeat(phase="teardown", step=4, time_s=0.0), now_s + 4.0)
    assert clock.silence_s == pytest.approx(SILENT_STEPS * 2.0)
    clock.beat(Heartbeat(phase="measure", step=5, time_s=0.0), now_s + 5.0)
    assert clock.silence_s == pytest.approx(SILENT_STEPS * 5.0)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=30))
def test_no_silence_as_long_as_a_step_that_was_seen_is_a_hang(step_times_s: list[float]) -> None:
    clock, now_s = Clock(Limits(step_s=1000.0, trial_s=1e9), started_s=0.0), 1.0
    clock.beat(Heartbeat(phase="warmup", step=1, time_s=0.0), now_s)
    for step, step_s in enumerate(step_times_s, start=2):
        now_s += step_s
        clock.beat(Heartbeat(phase="measure", step=step, time_s=0.0), now_s)
    assert max(step_times_s) < clock.silence_s <= 1000.0 or clock.silence_s == 1000.0
    assert clock.passed(now_s + max(step_times_s)) is None
