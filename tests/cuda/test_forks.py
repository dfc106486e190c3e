"""A forked rank can use CUDA: neither the process that loads Megatron nor torchrun's agent has used it before."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.gpus import H100, MIG_SLICE, eight
from tests.cuda.machines import Machine

RUN = """
import json, logging, sys, time
from pathlib import Path
from launchers.local import fork_client
from launchers.processes import MARKER, ColdJob, inherited_environment, loopback_torchrun
logging.basicConfig(level=logging.WARNING)
how, ranks, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
program = "tests.cuda.programs.uses_cuda"
fork_client.IMPORTED = {program: "launchers.programs.megatron_core.__main__"}
argv = (*loopback_torchrun(ranks, "trial", folder / "log"), "-m", program, str(folder))
env = {**inherited_environment(), MARKER: str(folder), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_FUSED_ATTN": "0"}
with fork_client.Preload(folder) as preload:
    start = ColdJob if how == "cold" else preload.start
    job = start(argv, env, folder, folder / "output.log")
    while not job.ended():
        time.sleep(0.1)
    job.end(grace_s=1.0)
    server = [] if how == "cold" else [each.process.pid for each in preload._servers]
print(json.dumps({"code": job.exit_code, "server": server, "forks": program not in preload._unforkable}))
"""

AGENT = """
import sys
from contextlib import nullcontext
import launchers.local.agent
from launchers.local.fork_cuda import hidden_cuda
from torch.distributed import run
with hidden_cuda() if sys.argv[1] == "hidden" else nullcontext():
    arguments = run.parse_args(["--nnodes=1", "--nproc-per-node=1", "--rdzv-endpoint=127.0.0.1:0", "-m", "program"])
    run.config_from_args(arguments)
"""

FLASH_ATTENTION = {
    "flash_attn-2.8.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n",
    "flash_attn/__init__.py": "",
    "flash_attn_2_cuda.py": "varlen_bwd = None\n",
    "flash_attn/flash_attn_interface.py": "def __getattr__(name): return None\n",
}
"""The files of a package that can be imported, and does nothing."""


def ranks_of(machine: Machine, how: str, ranks: int = 2) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a job; return what is told of it, and what each rank saw."""
    folder = machine.folder / how
    folder.mkdir()
    told = machine.told(RUN, how, str(ranks), str(folder))
    assert told["code"] == 0, (folder / "output.log").read_text()
    return told, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("visible", [None, "0,1"], ids=["all", "indices"])
def test_forked_ranks_can_use_cuda(visible: str | None, tmp_path: Path) -> None:
    machine = Machine(tmp_path, eight(H100), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    told, ranks = ranks_of(machine, "forked")
    assert [rank["error"] for rank in ranks] == ["", ""]
    assert told["forks"]
    assert {rank["devices"] for rank in ranks} == {2 if visible else 8}
    assert not [stack for pid, stack in machine.questions() if pid in told["server"]]


def test_trials_on_a_slice_of_a_gpu_start_cold(tmp_path: Path) -> None:
    """NVML cannot count MIG slices, so that torch asks CUDA already while Megatron is imported."""
    slices = [replace(MIG_SLICE, number=number) for number in (10, 11)]
    visible = ",".join(each.uuid for each in slices)
    machine = Machine(tmp_path, [H100, *slices], {"CUDA_VISIBLE_DEVICES": visible})
    told, ranks = ranks_of(machine, "forked")
    assert [rank["error"] for rank in ranks] == ["", ""]
    assert not told["forks"]
    assert "uses CUDA while it is imported" in machine.errors


def test_forked_and_cold_ranks_have_the_same_environment(tmp_path: Path) -> None:
    machine = Machine(tmp_path, eight(H100))
    (_, forked), (_, cold) = ranks_of(machine, "forked", 1), ranks_of(machine, "cold", 1)
    prefixes = ("CUDA_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_", "OMP_", "MASTER_ADDR", "RANK", "LOCAL_RANK")
    forked_variables, cold_variables = (
        {name: value for name, value in ranks[0]["environment"].items() if name.startswith(prefixes)}
        for ranks in (forked, cold)
    )
    assert forked_variables == cold_variables
    assert forked_variables["NVTE_FUSED_ATTN"] == "0"


def test_trials_start_cold_where_transformer_engine_uses_cuda_at_import(tmp_path: Path) -> None:
    """It asks for the compute capability if flash-attn is installed (utils.py, FlashAttentionUtils)."""
    for name, text in FLASH_ATTENTION.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    machine = Machine(tmp_path, eight(H100))
    machine.environment["PYTHONPATH"] += f":{tmp_path / 'site'}"
    told, ranks = ranks_of(machine, "forked")
    assert [rank["error"] for rank in ranks] == ["", ""]
    used_at_import = "True" in machine.run(
        "import transformer_engine.pytorch, torch; print(torch.cuda.is_initialized())"
    )
    assert told["forks"] is not used_at_import


def test_torchruns_agent_asks_for_cuda_unless_it_is_hidden(tmp_path: Path) -> None:
    machine = Machine(tmp_path, eight(H100))
    machine.run(AGENT, "hidden")
    assert machine.questions() == []
    machine.run(AGENT, "shown")
    asks = tuple(map(int, version("torch").split(".")[:2])) >= (2, 9)
    assert any("__post_init__" in stack for _, stack in machine.questions()) is asks
