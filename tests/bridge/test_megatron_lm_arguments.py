"""Megatron-LM's own parser and validation read our arguments as the layout that they state."""

import shlex
from dataclasses import replace
from random import Random

import pytest

from search_spaces.loader import load_cluster, load_model
from tests.bridge.layouts import drawn
from tests.bridge.megatron_lm import command, layout_of, parsed
from tests.bridge.writing import written
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Workload
from tuner.frameworks.megatron_lm.command import read_command
from tuner.frameworks.megatron_lm.trial_command import trial_words
from tuner.report.export import Format
from tuner.space.domain import refined_domain

CLUSTER = load_cluster("dgx-h100", nodes=4)


def drawn_layout(name: str, seed: int) -> tuple[Workload, Layout]:
    """Return a model's workload and a valid layout of it, equal in each run."""
    workload = Workload(model=load_model(name), seq_length=4096, global_batch_size=512)
    return workload, drawn(workload, CLUSTER, refined_domain(workload, CLUSTER), Random(f"{name}{seed}"))


def without_variables(layout: Layout) -> Layout:
    return replace(layout, **{knob: DEFAULTS[knob] for knob in ENVIRONMENT_KNOBS})


drawn_layouts = pytest.mark.parametrize(
    ("name", "seed"),
    [
        (name, seed)
        for name in ("llama3-8b", "llama3-70b", "qwen3-32b", "mixtral-8x7b", "qwen3-30b-a3b")
        for seed in range(5)
    ],
)


@drawn_layouts
def test_megatron_lm_reads_the_arguments_as_the_layout(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, layout = drawn_layout(name, seed)
    text = written(Format.MEGATRON_LM, workload, CLUSTER, layout)
    words = [*command(workload), *shlex.split(text.replace(" \\\n", " "), comments=True)]
    arguments = parsed(words, layout, CLUSTER, monkeypatch)
    assert arguments.global_batch_size == 512
    assert layout_of(arguments) == without_variables(layout)


@drawn_layouts
def test_a_trials_command_is_read_as_its_layout_whatever_layout_the_command_had(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, layout = drawn_layout(name, seed)
    before = trial_words(command(workload), drawn_layout(name, seed + 100)[1], workload, steps=100)
    words = trial_words(
        (*before, "--load", "/ckpt", "--rampup-batch-size", "8", "8", "1000"), layout, workload, 23
    )
    arguments = parsed(list(words), layout, CLUSTER, monkeypatch)
    assert layout_of(arguments) == without_variables(layout)
    assert layout_of(arguments) == without_variables(
        read_command(shlex.join(words), "gpt.sh", CLUSTER.world_size).layout
    )
    assert (arguments.train_iters, arguments.global_batch_size, arguments.log_interval) == (23, 512, 1)
    assert arguments.load is None and arguments.rampup_batch_size is None
