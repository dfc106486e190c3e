"""Lint judges a layout before it runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.loader import load_cluster, load_model
from tests.unit.frameworks.recipes import DENSE, as_saved
from tests.unit.frameworks.test_megatron_lm_command import SCRIPT
from tuner.cli.app import run
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.lint.judge import judge
from tuner.lint.nearest import nearest_layouts
from tuner.lint.verdict import LIKELY
from tuner.rules.validity import broken_rules

H100 = load_cluster("dgx-h100", nodes=4)
LLAMA_70B = Workload(model=load_model("llama3-70b"), seq_length=8192, global_batch_size=128)
MOE = Workload(model=load_model("qwen3-30b-a3b"), seq_length=4096, global_batch_size=256)
GOOD = Layout(tp=8, pp=4, vpp=5, sp=True, overlap_p2p_comm=True, overlap_grad_reduce=True)


def test_a_layout_that_megatron_takes_and_that_fits_starts() -> None:
    verdict = judge(GOOD, LLAMA_70B, H100)
    assert verdict.starts and not verdict.refused and not verdict.nearest
    assert verdict.worst is not None and 0 < verdict.worst.total_gib < H100.gpu.memory_gib


def test_a_refused_layout_gets_the_broken_equation_and_valid_layouts_near_it() -> None:
    verdict = judge(replace(GOOD, pp=3, vpp=1, overlap_p2p_comm=False), LLAMA_70B, H100)
    assert not verdict.starts
    assert any("32" in item.message and "must be 0" in item.message for item in verdict.refused)
    assert verdict.nearest
    assert {near.layout.pp for near in verdict.nearest} <= {2, 4}


def test_a_layout_that_is_too_large_is_not_refused_but_does_not_start() -> None:
    verdict = judge(Layout(tp=2, pp=2, sp=True), LLAMA_70B, H100)
    assert not verdict.refused and not verdict.starts
    assert verdict.fits is not None and verdict.fits < LIKELY
    assert verdict.nearest and all(near.fits >= LIKELY for near in verdict.nearest)


@pytest.mark.parametrize(
    ("layout", "workload", "text"),
    [
        (replace(GOOD, vpp=1, overlap_p2p_comm=False), LLAMA_70B, "20 per stage can be split"),
        (replace(GOOD, sp=False), LLAMA_70B, "without sequence parallelism"),
        (replace(GOOD, use_distributed_optimizer=False), LLAMA_70B, "no distributed optimizer"),
        (replace(GOOD, tp=16, pp=2), LLAMA_70B, "leave its NVLink domain"),
        (Layout(ep=32), MOE, "= 1: the experts' optimizer state is not sharded"),
    ],
)
def test_a_choice_that_starts_and_is_slow_gives_a_warning(
    layout: Layout, workload: Workload, text: str
) -> None:
    verdict = judge(layout, workload, H100)
    assert not verdict.refused
    assert any(text in warning for warning in verdict.warnings)


@settings(max_examples=15)
@given(
    layout=st.builds(
        Layout,
        tp=st.integers(1, 16),
        pp=st.integers(1, 12),
        cp=st.integers(1, 4),
        sp=st.booleans(),
        micro_batch_size=st.integers(1, 5),
    )
)
def test_the_nearest_layouts_of_any_layout_are_valid(layout: Layout) -> None:
    for near in nearest_layouts(layout, LLAMA_70B, H100):
        assert broken_rules(near.layout, LLAMA_70B, H100) == ()


def test_the_command_judges_a_script_and_exits_with_2_if_it_would_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.sh", tmp_path / "bad.sh"
    good.write_text(SCRIPT)
    bad.write_text(SCRIPT.replace("TP:-2", "TP:-3"))
    assert run(["lint", str(good)]) == 0
    assert "starts" in capsys.readouterr().out
    assert run(["lint", str(good), str(bad)]) == 2
    output = capsys.readouterr().out
    assert "refused" in output and "tp" in output and "near:" in output


def test_the_command_judges_the_config_that_bridge_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run_config.yaml"
    file.write_text(yaml.safe_dump(as_saved(DENSE)), encoding="utf-8")
    assert run(["lint", str(file), "--gpus", "8", "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["state"], finding["gpus"], finding["gpu"]) == ("starts", 8, "NVIDIA H100 80GB HBM3")
    file.write_text(yaml.safe_dump(as_saved({**DENSE, "model.num_layers": 31})), encoding="utf-8")
    assert run(["lint", str(file), "--gpus", "8"]) == 2
    assert "num_layers (31) % (pp = 2) = 1, must be 0" in capsys.readouterr().out
