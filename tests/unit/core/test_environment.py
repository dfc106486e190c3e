"""A record keeps the variables that a measurement depends on, and never a secret."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trials import CLUSTER
from tuner.core.environment import RECORDED, cuda_environment, looks_secret, recorded_environment
from tuner.core.layout import Layout

_LETTERS = string.ascii_letters + string.digits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        ("CUDA_HOME", "/usr/local/cuda-12.8"),
        ("LD_LIBRARY_PATH", "/usr/local/cuda-12.8/lib64:/opt/hpcx/ucx/lib:/usr/lib/x86_64-linux-gnu"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo"),
        ("NCCL_IB_HCA", "mlx5_0:1,mlx5_1:1,mlx5_4:1"),
        ("NCCL_P2P_NET_CHUNKSIZE", "524288"),
        ("NCCL_NVLS_ENABLE", "0"),
        ("NVTE_FLASH_ATTN", "1"),
        ("OMP_NUM_THREADS", "4"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,garbage_collection_threshold:0.8"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        ("MEGATUNE_TRIAL", "/home/ann/results/tiny-gpt/trials/t0001"),
    ],
)
def test_a_variable_that_a_measurement_depends_on_is_kept(name: str, value: str) -> None:
    assert recorded_environment({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_TOKEN", "1"),
        ("MEGATUNE_API_KEY", "x"),
        ("MEGATUNE_KEY", "x"),
        ("TORCH_DB_PASSWORD", "x"),
        ("UCX_AUTH", "x"),
        ("MEGATUNE_URI", "postgresql://me:hunter2@db/runs"),
        ("MEGATUNE_URI", "none, or https://me:hunter2@host"),
        ("NCCL_NOTE", "hf_aBcD3fGh1jKlMn0pQrStUvWxYz0123456"),
        ("NCCL_NOTE", "AKIAIOSFODNN7EXAMPLEQ1Z5"),
        ("NCCL_NOTE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        ("NCCL_NOTE", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"),
        ("NCCL_NOTE", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0"),
    ],
)
def test_a_variable_that_looks_like_a_secret_is_never_kept(name: str, value: str) -> None:
    assert looks_secret(name, value)
    assert recorded_environment({name: value}) == {}


@pytest.mark.parametrize(
    "name", ["AWS_REGION", "HOME", "PATH", "MLFLOW_TRACKING_URI", "SLURM_JOB_ID", "PYTHONPATH"]
)
def test_no_other_variable_is_kept_whatever_it_holds(name: str) -> None:
    assert recorded_environment({name: "1"}) == {}


@given(st.dictionaries(st.text("ABCDEFN_C", min_size=1), st.text()))
def test_a_record_invents_and_changes_nothing(environment: dict[str, str]) -> None:
    kept = recorded_environment(environment)
    assert kept.items() <= environment.items()
    assert not any(looks_secret(name, value) for name, value in kept.items())


@given(st.sampled_from(RECORDED), st.integers(32, 80), st.integers())
def test_random_keys_are_recognised(prefix: str, length: int, seed: int) -> None:
    key = "".join(random.Random(seed).choices(_LETTERS, k=length)) + "7"
    assert looks_secret(f"{prefix}X", key)


def test_a_variable_whose_knob_has_its_default_is_left_to_the_shell() -> None:
    assert cuda_environment(Layout(), CLUSTER).keys() == {"CUDA_DEVICE_MAX_CONNECTIONS"}


def test_defaults_are_stated_if_a_recipe_may_state_other_values() -> None:
    variables = cuda_environment(Layout(), CLUSTER, complete=True)
    assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False"
    assert variables["NCCL_NVLS_ENABLE"] == "2"


@pytest.mark.parametrize("complete", [False, True])
def test_the_knobs_of_the_environment_become_its_variables(complete: bool) -> None:
    layout = Layout(tp=2, cuda_device_max_connections=16, expandable_segments=True, nccl_nvls_enable=False)
    assert cuda_environment(layout, CLUSTER, complete) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "16",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_NVLS_ENABLE": "0",
    }


def test_nccl_does_not_register_graphs_in_segments_that_grow() -> None:
    layout = Layout(expandable_segments=True, cuda_graph_impl="transformer_engine")
    assert cuda_environment(layout, CLUSTER)["NCCL_GRAPH_REGISTER"] == "0"


def test_megatron_fsdp_never_gets_a_single_queue() -> None:
    assert cuda_environment(Layout(tp=2), CLUSTER)["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    sharded = Layout(tp=2, use_megatron_fsdp=True)
    assert cuda_environment(sharded, CLUSTER)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
