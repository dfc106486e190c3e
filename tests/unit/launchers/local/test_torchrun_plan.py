"""The torchrun launcher plans a trial without touching anything."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import inherited_environment
from tests.trials import CLUSTER, spec_of
from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import parse
from tuner.trial.contract import TrialFolder, TrialSpec
from tuner.trial.launcher import Place

CPU = replace(CLUSTER, device="cpu", gpus_per_node=4)
FOLDER = TrialFolder(Path("/nowhere/a 'night'/t0000"))


def test_planning_touches_nothing_and_starts_one_rank_per_gpu(tmp_path: Path) -> None:
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


def test_several_nodes_are_refused_with_their_number() -> None:
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


def test_the_allocator_has_the_layouts_segments_and_the_users_other_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(names[0], "max_split_size_mb:512,expandable_segments:True")
    monkeypatch.setenv(names[1], "backend:native")
    env = TorchrunLauncher().plan(spec_of(0, Layout()), FOLDER).env
    assert [env[name] for name in names] == ["max_split_size_mb:512,expandable_segments:False"] * 2


def test_only_cuda_jobs_get_cuda_variables() -> None:
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
def test_flexible_dispatch_gets_the_number_of_its_ranks_in_an_nvlink_domain(ep: int, ranks: str) -> None:
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


def test_only_a_cuda_job_uses_gpus() -> None:
    launcher = TorchrunLauncher()
    assert launcher.plan(spec_of(0, Layout()), FOLDER).gpus == 8
    assert launcher.plan(spec_of(0, Layout(), cluster=CPU), FOLDER).gpus == 0


def test_a_cuda_job_sees_the_gpus_of_its_place_and_a_cpu_job_sees_none() -> None:
    launcher, place, names = TorchrunLauncher(), Place(gpus=(4, 6)), "CUDA_VISIBLE_DEVICES"
    assert launcher.plan(spec_of(0, Layout()), FOLDER, place).env[names] == "4,6"
    assert names not in launcher.plan(spec_of(0, Layout()), FOLDER).env
    assert launcher.plan(spec_of(0, Layout(), cluster=CPU), FOLDER, place).env[names] == ""
