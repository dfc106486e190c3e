"""A user's own Megatron-LM command as a trial runs it, and as a sweep and an export state it."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.trials import completed_row, spec_of
from tests.unit.frameworks.mixture_table import TABLE, WORKLOAD
from tests.unit.frameworks.test_megatron_lm_command import GPT
from tests.unit.frameworks.test_megatron_lm_script import SCRIPT
from tests.unit.layouts import cluster
from tuner.analysis.figures import figures
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.trial_command import trial_words, with_layout
from tuner.report.export import Format, export
from tuner.space.table import layout_at
from tuner.sweep.configuration import Sweep
from tuner.sweep.resolution import load_sweep
from tuner.trial.program import MegatronLm

COMMAND = ("/home/ann/Megatron-LM/pretrain_gpt.py", *shlex.split(GPT))
OWN = shlex.split(
    "--tensor-model-parallel-size=8 --sequence-parallel --pipeline-model-parallel-size 4 "
    "--num-layers-per-virtual-pipeline-stage 2 --recompute-activations --recompute-modules core_attn mlp "
    "--use-megatron-fsdp --ckpt-format fsdp_dtensor --cuda-graph-scope attn mlp --moe-enable-deepep "
    "--rampup-batch-size 16 16 1000 --train-iters 500000 --lr 1.5e-4 --lr-warmup-iters 2000 --save /ckpt "
    "--load /ckpt --save-interval 500 --eval-iters 32 --log-interval 100 --exit-interval 100 --wandb-project p"
)
PLAIN: Workload = read_command(GPT, "gpt.sh", world_size=8).workload


def _arguments(words: tuple[str, ...]) -> dict[str, list[str]]:
    arguments: dict[str, list[str]] = {}
    for word in words[1:]:
        if word.startswith("--"):
            assert word not in arguments, f"{word} is given twice"
            arguments[word] = []
        else:
            arguments[list(arguments)[-1]].append(word)
    return arguments


def test_every_spelling_of_a_knob_is_replaced_by_the_layout() -> None:
    words = trial_words((*COMMAND, *OWN), Layout(tp=2), PLAIN, steps=23)
    arguments = _arguments(words)
    assert words[0] == COMMAND[0]
    assert arguments["--tensor-model-parallel-size"] == ["2"]
    assert read_command(shlex.join(words), "gpt.sh", world_size=8).layout == Layout(tp=2)
    for flag in ("--num-layers-per-virtual-pipeline-stage", "--recompute-activations", "--recompute-modules"):
        assert flag not in arguments
    for flag in ("--use-megatron-fsdp", "--ckpt-format", "--cuda-graph-scope", "--moe-enable-deepep"):
        assert flag not in arguments


def test_a_trial_is_short_and_leaves_nothing_behind() -> None:
    arguments = _arguments(trial_words((*COMMAND, *OWN), Layout(), PLAIN, steps=23))
    assert arguments["--train-iters"] == ["23"]
    assert arguments["--log-interval"] == ["1"]
    assert arguments["--eval-iters"] == ["0"]
    assert arguments["--global-batch-size"] == ["64"]
    for flag in ("--save", "--load", "--save-interval", "--exit-interval", "--wandb-project"):
        assert flag not in arguments
    assert "--rampup-batch-size" not in arguments


def test_the_learning_rate_follows_the_schedule_of_the_whole_training() -> None:
    arguments = _arguments(trial_words((*COMMAND, *OWN), Layout(), PLAIN, steps=23))
    assert arguments["--lr-decay-iters"] == ["500000"]
    assert arguments["--lr-warmup-iters"] == ["2000"]
    assert arguments["--lr"] == ["1.5e-4"]


def test_a_schedule_in_samples_becomes_one_in_steps() -> None:
    samples = ("--train-samples", "6400", "--lr-warmup-samples", "100", "--lr-decay-samples", "3200")
    arguments = _arguments(trial_words((*COMMAND, *samples), Layout(), PLAIN, steps=23))
    assert (arguments["--lr-decay-iters"], arguments["--lr-warmup-iters"]) == (["50"], ["2"])
    assert not [flag for flag in arguments if flag.endswith("-samples")]
    short = _arguments(trial_words((*COMMAND, *samples[:2]), Layout(), PLAIN, steps=23))
    assert short["--lr-decay-iters"] == ["100"]


@pytest.mark.parametrize(
    ("users_format", "layout", "stated"),
    [
        ("torch", Layout(), ["torch"]),
        ("fsdp_dtensor", Layout(), None),
        (
            "torch",
            Layout(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim"),
            ["fsdp_dtensor"],
        ),
    ],
)
def test_the_format_of_checkpoints_is_the_users_unless_megatron_fsdp_decides_it(
    users_format: str, layout: Layout, stated: list[str] | None
) -> None:
    words = with_layout((*COMMAND, "--ckpt-format", users_format, "--save", "/ckpt"), layout, PLAIN)
    assert _arguments(words).get("--ckpt-format") == stated
    assert _arguments(words)["--save"] == ["/ckpt"]


def test_the_export_is_the_users_own_command_with_the_layout() -> None:
    program = MegatronLm(megatron_lm=(*COMMAND, *OWN))
    spec = replace(spec_of(1, Layout(pp=2)), workload=PLAIN, program=program)
    rows = [completed_row(1, 80.0, layout=Layout(pp=2))]
    facts = figures(rows)
    assert facts is not None
    text = export(Format.of(program), spec, facts, "again")
    words = tuple(shlex.split(text.replace(" \\\n", " "), comments=True))
    assert words == with_layout(program.megatron_lm, Layout(pp=2), PLAIN)
    arguments = _arguments(words)
    assert arguments["--pipeline-model-parallel-size"] == ["2"]
    assert arguments["--tensor-model-parallel-size"] == ["1"]
    assert "--sequence-parallel" not in arguments and "--recompute-activations" not in arguments
    assert (arguments["--train-iters"], arguments["--load"]) == (["500000"], ["/ckpt"])


def test_a_schedule_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(InputError, match="--train-iters many: must be one whole number"):
        trial_words((*COMMAND, "--train-iters", "many"), Layout(), PLAIN, steps=23)


@given(row=st.integers(0, len(TABLE) - 1), other=st.integers(0, len(TABLE) - 1))
def test_a_command_with_any_layout_gets_the_layout_of_the_trial(row: int, other: int) -> None:
    layout = layout_at(TABLE, row)
    model = (*COMMAND, "--num-experts", "8")
    before = trial_words(model, layout_at(TABLE, other), WORKLOAD, steps=23)
    words = trial_words(before, layout, WORKLOAD, steps=23)
    assert set(words) == set(trial_words(model, layout, WORKLOAD, steps=23)) | {"--lr-decay-iters"}
    read = read_command(shlex.join(words), "gpt.sh", world_size=16)
    assert read.layout == layout
    assert read.workload.global_batch_size == WORKLOAD.global_batch_size


def _sweep(folder: Path, program: list[str], **other: Any) -> Sweep:
    file = folder / "sweep.yaml"
    data = {"name": "night", "cluster": "dgx-h100", "program": {"megatron_lm": program}, **other}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return load_sweep(file, lambda: cluster(8))


def test_a_sweep_needs_no_more_than_the_users_script(tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").touch()
    script = SCRIPT.replace("--bf16", "--bf16 --vocab-size 50257 --max-position-embeddings 1024")
    (tmp_path / "train.sh").write_text(script, encoding="utf-8")
    sweep = _sweep(tmp_path, ["train.sh"])
    assert isinstance(sweep.program, MegatronLm)
    assert sweep.program.megatron_lm[0] == str(tmp_path / "pretrain_gpt.py")
    assert (sweep.workload.model.num_layers, sweep.workload.seq_length) == (24, 1024)
    assert sweep.baseline == Layout(tp=2, use_distributed_optimizer=False)
    assert 2 in sweep.domain["tp"]


def test_a_workload_may_be_stated_if_only_a_run_could_tell_it(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(SCRIPT, encoding="utf-8")
    with pytest.raises(InputError, match="the vocabulary size is not known"):
        _sweep(tmp_path, ["train.sh"])
    stated = {"model": "llama3-8b", "seq_length": 1024, "global_batch_size": 64}
    sweep = _sweep(tmp_path, ["train.sh"], workload=stated, baseline={"tp": 2})
    assert sweep.workload.model.name == "llama3-8b"


def test_a_missing_script_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"sweep.yaml: key 'program.megatron_lm': .*train.sh: cannot be read"
    ):
        _sweep(tmp_path, ["train.sh"])
