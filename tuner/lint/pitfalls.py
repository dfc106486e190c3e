"""Warns of valid choices in a layout that cost speed or memory.

Source: Megatron Bridge, skills/perf-parallelism-strategies, section on pitfalls.
"""

from collections.abc import Iterator

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout, expert_data_parallel_size
from tuner.core.workload import Workload


def pitfalls(layout: Layout, workload: Workload, cluster: Cluster) -> Iterator[str]:
    """Yield one warning per choice in a valid layout that costs speed or memory."""
    layers = workload.model.num_layers
    if layout.pp > 1 and layout.vpp == 1 and layers % layout.pp == 0 and layers // layout.pp > 1:
        yield (
            f"pp {layout.pp} without interleaving: the bubble is {layout.pp - 1} micro-batches long; "
            f"{layers} layers / pp {layout.pp} = {layers // layout.pp} per stage can be split (vpp)"
        )
    if layout.tp > 1 and not layout.sp:
        yield f"tp {layout.tp} without sequence parallelism: every rank keeps whole activations between its blocks"
    edp = expert_data_parallel_size(cluster.world_size, layout.pp, layout.ep, layout.etp)
    if workload.model.is_moe and layout.use_distributed_optimizer and edp == 1:
        yield (
            f"edp = {cluster.world_size} / (pp {layout.pp} * ep {layout.ep} * etp {layout.etp}) = 1: "
            "the experts' optimizer state is not sharded"
        )
    if not layout.use_distributed_optimizer:
        yield "no distributed optimizer: every data parallel rank keeps the whole optimizer state"
