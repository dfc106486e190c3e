"""How long every layout of a model takes to enumerate, and how much memory: `python -m tests.bench.space
[model]`.
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


def peak_rss_mib() -> float:
    """This process's peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Enumerate every knob of the model on 4,096 GPUs; the targets are 2 s and 1 GiB for DeepSeek-V3."""
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
    before = peak_rss_mib()
    started, cpu = time.perf_counter(), time.process_time()
    space = enumerate_layouts(workload, cluster, default_domain(workload, cluster))
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    grown = peak_rss_mib() - before
    table_mib = space.table.memory_usage(deep=True).sum() / 2**20
    print(
        f"{name} on {cluster.world_size} GPUs: {space.combinations:,} combinations, {len(space.table):,} "
        "valid layouts"
    )
    print(f"{wall_s:.2f} s wall, {cpu_s:.2f} s CPU, peak memory +{grown:.0f} MiB, table {table_mib:.0f} MiB")
    print(with_derived(space.table.head(3), workload, cluster).T.to_string())


if __name__ == "__main__":
    main()
