"""Without Transformer Engine, the predicted peak on CUDA is what Torch's own layers allocate there.

What they allocate is imitated on fake tensors (tests/bench/torch_on_cuda.py); no GPU is needed.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from launchers.programs.megatron_core.probe import prepare, probe
from search_spaces.loader import load_cluster
from tests.bench.oracle_memory import MLA, MOE, model
from tests.bench.torch_on_cuda import torch_on_cuda
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.predict.implementation import implementation_of
from tuner.predict.memory.peak import memory_breakdown

H100 = load_cluster("dgx-h100")
FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
GPT: dict[str, Any] = {
    "num_query_groups": 16,
    "gated_linear_unit": False,
    "activation_func": "gelu",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
}


small = partial(model, "small", num_layers=4)

CASES: dict[str, tuple[Model, Layout, int]] = {
    "dense": (small(), Layout(micro_batch_size=2), 1),
    "normed queries": (small(qk_layernorm=True), Layout(micro_batch_size=2), 1),
    "sequence parallel": (small(), Layout(tp=2, sp=True, micro_batch_size=4), 8),
    "pipeline": (small(), Layout(pp=2, micro_batch_size=2), 8),
    "layer norm": (small(**GPT), Layout(micro_batch_size=2), 1),
    "experts": (small(**MOE), Layout(ep=4, micro_batch_size=2), 8),
    "latent attention": (small(**MLA), Layout(micro_batch_size=2), 1),
    "latent attention, recomputed": (small(**MLA), Layout(tp=2, sp=True, micro_batch_size=2, **FULL), 8),
    "window and grouped queries": (small(window_size=(511, 0)), Layout(), 1),
    "window": (small(window_size=(511, 0), num_query_groups=16), Layout(micro_batch_size=2), 1),
    "context parallel": (small(), Layout(cp=2, micro_batch_size=2), 8),
    "sinks": (small(softmax_type="learnable"), Layout(), 1),
    "all weights updated at once": (small(num_layers=12, vocab_size=128_000), Layout(**FULL), 1),
}


@pytest.fixture(scope="module", autouse=True)
def imitation() -> Iterator[None]:
    prepare(H100)
    with torch_on_cuda():
        yield


@pytest.mark.parametrize(("of", "layout", "gpus"), CASES.values(), ids=CASES.keys())
def test_torchs_own_layers_are_predicted(of: Model, layout: Layout, gpus: int) -> None:
    cluster = replace(H100, gpus_per_node=gpus, nvlink_domain_gpus=gpus, transformer_engine=False)
    balanced = of.is_moe
    workload = Workload(
        model=of, seq_length=2048, global_batch_size=32, moe_router_force_load_balancing=balanced
    )
    stage = memory_breakdown(layout, workload, cluster, implementation_of(cluster), imbalance=1.0)[0]
    allocated_gib, _ = probe(workload, layout, gpus, 0, as_gloo=False)
    assert stage.total_gib == pytest.approx(allocated_gib, rel=0.04)
