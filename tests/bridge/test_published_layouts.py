"""Every published layout, and every layout of the guide, is read back from its export.

It is read back by Megatron Bridge's override code, on a plain config of the model, and by Megatron-LM's parser.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from search_spaces.loader import load_cluster, load_model
from tests.bench.recorded import AXES, MODELS, PUBLISHED, SYSTEMS
from tests.bridge import megatron_lm
from tests.bridge.layouts import evenly
from tests.bridge.reading import layout_of
from tests.bridge.writing import written
from tuner.core.cluster import Cluster
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.frameworks.megatron_bridge import recipe_layout
from tuner.frameworks.megatron_bridge.values import values_of
from tuner.frameworks.megatron_lm.command import read_command
from tuner.report.export import Format
from tuner.rules.validity import broken_rules
from tuner.space.domain import search_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.guide import read_guide
from tuner.space.heuristics import seeds

Published = tuple[Workload, Cluster, Layout]

DENSE = ("qwen3-0.6b", "llama3-8b", "qwen3-32b", "llama3-70b", "llama3.1-405b")
"""One model per row of the guide's table of dense models."""
PUBLISHED_ROWS = 93
"""Number of rows of the published tables."""


def published_rows() -> list[Any]:
    """Return the rows of the published tables; none if the tables are not beside the repository."""
    return list(pd.read_csv(PUBLISHED).itertuples()) if PUBLISHED.exists() else []


ROWS = published_rows()


def published(row: Any) -> Published:
    """Return a row's workload, cluster and layout; the knobs that the tables do not state have their defaults."""
    model = load_model(MODELS[row.model])
    precision = row.precision.lower()
    workload = Workload(
        model=model,
        seq_length=int(row.seq_length),
        global_batch_size=int(row.global_batch_size),
        precision=precision,
    )
    cluster = load_cluster(SYSTEMS[row.system])
    gpus_per_node = min(int(row.gpus), cluster.gpus_per_node)
    cluster = replace(cluster, nodes=int(row.gpus) // gpus_per_node, gpus_per_node=gpus_per_node)
    sizes: dict[str, Any] = {axis: int(getattr(row, axis)) for axis in AXES}
    sharded = bool(row.fsdp)
    layout = Layout(
        **sizes,
        sp=sizes["tp"] > 1,
        overlap_p2p_comm=sizes["vpp"] > 1,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        use_megatron_fsdp=sharded,
        data_parallel_sharding_strategy="optim_grads_params" if sharded else "no_shard",
    )
    return workload, cluster, layout


def guided() -> Iterator[tuple[str, Published]]:
    """Yield the rows of the guide's tables and the seeds that follow from the guide, each with a name."""
    guide = read_guide()
    for row in guide.moe:
        sizes: dict[str, Any] = {"tp": row.tp, "pp": row.pp, "ep": row.ep, "cp": row.cp or 1}
        yield f"{row.model} of the guide", (*_job(row.model, 4096), Layout(**sizes, sp=row.tp > 1))
    for name in (*DENSE, *dict.fromkeys(row.model for row in guide.moe)):
        seen = set()
        for seq_length in (4096, 32768):
            workload, cluster = _job(name, seq_length)
            table = enumerate_layouts(workload, cluster, search_domain(workload, cluster)).table
            for number, seed in enumerate(seeds(workload, cluster, table)):
                if seed.layout not in seen:
                    yield f"{name} {seq_length} seed {number}", (workload, cluster, seed.layout)
                seen.add(seed.layout)


def _job(model: str, seq_length: int) -> tuple[Workload, Cluster]:
    workload = Workload(model=load_model(model), seq_length=seq_length, global_batch_size=2048)
    return workload, load_cluster("dgx-h100", nodes=128)


STATED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "mtp_num_layers",
)
"""Fields of Model that `config_of` sets."""


def config_of(workload: Workload) -> Any:
    """Return a plain config of the model; attention and MLP have the model's sizes, not its kinds."""
    config = _pretrain_common()
    model = workload.model
    stated = {name: getattr(model, name) for name in STATED}
    config.model = GPTModelProvider(
        **{name: value for name, value in stated.items() if value is not None},
        seq_length=workload.seq_length,
        gated_linear_unit=True,
        add_bias_linear=False,
    )
    if isinstance(model.moe_layer_freq, tuple):
        config.model.moe_layer_freq = list(model.moe_layer_freq)
    config.dataset.seq_length = workload.seq_length
    config.train.global_batch_size = workload.global_batch_size
    return config


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Return a patcher for a test that sets the environment and the device of a job; both are restored."""
    environment = dict(os.environ)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(environment)


def applied(example: Published) -> Any:
    """Return Bridge's config after it applied the override."""
    text = written(Format.BRIDGE_CLI, *example)
    words = shlex.split(text.replace(" \\\n", " "), comments=True)
    return process_config_with_overrides(config_of(example[0]), cli_overrides=words)


def read_by_bridge(example: Published, job: pytest.MonkeyPatch) -> Layout:
    """Return the layout that Bridge has after it applied and resolved the override."""
    _, cluster, layout = example
    config = applied(example)
    os.environ.update(WORLD_SIZE=str(cluster.world_size), RANK="0", **cuda_environment(layout, cluster))
    device = SimpleNamespace(major=9 if "H" in cluster.gpu.name else 10, name=cluster.gpu.name)
    job.setattr(torch.cuda, "get_device_properties", lambda index: device)
    runtime_config_update(config)
    return layout_of(config)


def read_by_megatron_lm(example: Published, job: pytest.MonkeyPatch) -> tuple[Layout, Layout]:
    """Return the layout that Megatron-LM reads of a command, and the layout that we read of it."""
    workload, cluster, layout = example
    text = written(Format.MEGATRON_LM, workload, cluster, layout)
    words = [*megatron_lm.command(workload), *shlex.split(text.replace(" \\\n", " "), comments=True)]
    arguments = megatron_lm.parsed(words, layout, cluster, job)
    return megatron_lm.layout_of(arguments), read_command(
        shlex.join(words), "x.sh", cluster.world_size
    ).layout


@pytest.mark.skipif(not ROWS, reason=f"{PUBLISHED.name} is not beside the repository")
def test_every_published_layout_is_there() -> None:
    assert len(ROWS) == PUBLISHED_ROWS


@pytest.mark.parametrize("row", evenly(ROWS, PUBLISHED_ROWS), ids=lambda row: f"row{row.Index}")
def test_a_published_layout_comes_back_from_bridge_and_from_megatron_lm(
    row: Any, job: pytest.MonkeyPatch
) -> None:
    example = published(row)
    workload, cluster, layout = example
    assert not broken_rules(layout, workload, cluster)
    assert read_by_bridge(example, job) == layout
    assert read_by_megatron_lm(example, job) == (layout, layout)


GUIDED = dict(guided())


@pytest.mark.parametrize("name", evenly(list(GUIDED), len(GUIDED)))
def test_a_layout_of_the_guide_comes_back_from_bridge_and_from_megatron_lm(
    name: str, job: pytest.MonkeyPatch
) -> None:
    workload, cluster, layout = GUIDED[name]
    if broken_rules(layout, workload, cluster):
        # The guide's table rounds, so that a layout may be invalid; Bridge then only applies its override.
        assert recipe_layout.layout_of(values_of(applied(GUIDED[name]))) == layout
        return
    assert read_by_bridge(GUIDED[name], job) == layout
    assert read_by_megatron_lm(GUIDED[name], job) == (layout, layout)
