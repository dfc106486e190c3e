"""How long it takes to enumerate every layout of a model, and how much memory.

Run `python -m tests.bench.space [MODEL]`.
"""

import resource
import sys
import time

from search_spaces.loader import load_model
from tuner.core.cluster import Cluster, Gpu
from tuner.core.workload import Workload
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.table import with_derived

NODES = 512
"""Nodes of 8 GPUs each."""


def peak_rss_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Enumerate every layout of the model on 4,096 GPUs; for DeepSeek-V3 the targets are 2 s and 1 GiB."""
    name = sys.argv[1] if len(sys.argv) > 1 else "deepseek-v3"
    workload = Workload(model=load_model(name), seq_length=4096, global_batch_size=15360)
    cluster = Cluster(
        name="hopper",
        gpu=Gpu(name="H100", memory_gib=80, peak_tflops={"bf16": 989}, memory_bandwidth_gb_per_s=3350),
        nodes=NODES,
        gpus_per_node=8,
        nvlink_domain_gpus=8,
        nvlink_bandwidth_gb_per_s=450,
        nvlink_latency_us=5,
        fabric_bandwidth_gb_per_s=50,
        fabric_latency_us=10,
    )
    before_mib = peak_rss_mib()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    space = enumerate_layouts(workload, cluster, default_domain(workload, cluster))
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    grown_mib = peak_rss_mib() - before_mib
    table_mib = space.table.memory_usage(deep=True).sum() / 2**20
    print(
        f"{name} on {cluster.world_size} GPUs: {space.combinations:,} combinations, {len(space.table):,} "
        "valid layouts"
    )
    print(
        f"{wall_s:.2f} s wall, {cpu_s:.2f} s CPU, peak memory +{grown_mib:.0f} MiB, table {table_mib:.0f} MiB"
    )
    print(with_derived(space.table.head(3), workload, cluster).T.to_string())


if __name__ == "__main__":
    main()
