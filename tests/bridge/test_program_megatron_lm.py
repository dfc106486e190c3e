"""Trials of a Megatron-LM command: its own arguments, training loop and log, on Gloo ranks."""

import shlex
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.local.torchrun import TorchrunLauncher
from search_spaces.loader import load_cluster
from tuner.core.layout import Layout
from tuner.frameworks.megatron_lm.command import read_command
from tuner.trial.contract import Measurement, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.program import MegatronLm

SCRIPT = Path(__file__).parent / "pretrain_gpt.py"
PAIR = replace(load_cluster("cpu-4"), name="pair", gpus_per_node=2, nvlink_domain_gpus=2)
ARGUMENTS = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64 --swiglu "
    "--normalization RMSNorm --max-position-embeddings 64 --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 511 --mock-data "
    "--lr 1e-3 --lr-decay-style constant --train-iters 100000 --lr-warmup-iters 10 --attention-dropout 0 "
    "--hidden-dropout 0 --global-batch-size 8 --log-interval 100 --eval-iters 10 --eval-interval 1000 "
    # Only what a CPU can run.
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion --no-persist-layer-norm "
    # The command's own layout, in several spellings.
    "--tensor-model-parallel-size=2 --sequence-parallel --recompute-activations --micro-batch-size 4"
)


def run(folder: Path, layout: Layout, arguments: str = ARGUMENTS) -> TrialResult:
    command = read_command(ARGUMENTS, "tiny.sh", world_size=2)
    spec = TrialSpec(
        sweep="night",
        number=0,
        workload=command.workload,
        cluster=PAIR,
        layout=layout,
        program=MegatronLm(
            megatron_lm=(str(SCRIPT), *shlex.split(arguments), "--save", str(folder / "ckpt"))
        ),
        measurement=Measurement(warmup_steps=3, min_steps=3, max_steps=5),
    )
    launcher = TorchrunLauncher()
    return launcher.run(launcher.plan(spec, TrialFolder(folder)), threading.Event())


def output(folder: Path) -> str:
    return (folder / "log" / "torchrun.log").read_text(encoding="utf-8")


def test_layouts_of_a_command_train_alike_and_are_measured_from_its_log(tmp_path: Path) -> None:
    losses = []
    placed = Layout(pp=2, micro_batch_size=2, pipeline_model_parallel_layout="Ettt|tL")
    for layout, stated in (
        (Layout(tp=2), "tensor_model_parallel_size ...................... 2"),
        (placed, "pipeline_model_parallel_layout .................. Ettt|tL"),
    ):
        folder = tmp_path / f"mbs{layout.micro_batch_size}"
        result = run(folder, layout)
        assert result.outcome is Outcome.COMPLETED, result.reason
        assert result.metrics is not None
        assert len(result.metrics.losses) == 8
        assert 0 < result.metrics.step_time_low_ms <= result.metrics.step_time_ms
        # The memory of the process: Torch and a tiny model.
        assert 0.1 < result.metrics.peak_allocated_gib < 4
        assert stated in output(folder)
        assert "recompute_granularity ........................... None" in output(folder)
        assert not (folder / "ckpt").exists()
        losses.append(result.metrics.losses)
    # Megatron-LM's initial weights depend on the rank that makes them.
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)
    assert losses[0][-1] < losses[0][0]


def test_what_megatron_lm_refuses_is_invalid_in_its_own_words(tmp_path: Path) -> None:
    result = run(tmp_path, Layout(tp=2, vpp=2))
    assert result.outcome is Outcome.INVALID, result.reason
    assert "pipeline" in result.reason
