"""Compares predicted with measured peak memory: `python -m tests.gpu.memory` prints a JSON line per layout.

It runs one rank of each job on this machine's GPU, with real tensors and a process group whose other ranks do not exist
(launchers/programs/megatron_core/probe.py). Without a GPU the tensors are fake, and the lines prove nothing about one.
"""

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pynvml
import torch

from launchers.programs.megatron_core.probe import prepare, probe
from search_spaces.loader import load_cluster, load_model
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.predict.memory.peak import memory_breakdown

GIB = 2**30
FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One rank of a job."""

    model: str
    seq_length: int
    cluster: Cluster
    layout: Layout


def cases() -> Iterator[Case]:
    """Yield the cases: 32 layouts of four models, for one GPU and for eight, from small peaks to the GPU's limit."""
    eight = load_cluster("dgx-h100")
    one = replace(eight, gpus_per_node=1, nvlink_domain_gpus=1)
    for segments in (False, True):
        for micro_batch_size in (1, 4, 8, 16):
            layout = Layout(micro_batch_size=micro_batch_size, expandable_segments=segments)
            yield Case("qwen3-0.6b", 4096, one, layout)
            yield Case("qwen3-0.6b", 4096, one, replace(layout, **FULL))
    for micro_batch_size in (1, 2, 3):
        yield Case("llama3.2-1b", 8192, one, Layout(micro_batch_size=micro_batch_size))
        yield Case("llama3.2-1b", 8192, one, Layout(micro_batch_size=micro_batch_size, **FULL))
    for tp, pp, micro_batch_size in ((8, 1, 1), (8, 1, 2), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 1)):
        yield Case(
            "llama3-8b", 8192, eight, Layout(tp=tp, sp=tp > 1, pp=pp, micro_batch_size=micro_batch_size)
        )
    for tp, pp, micro_batch_size in ((4, 2, 2), (2, 2, 1)):
        layout = Layout(tp=tp, sp=True, pp=pp, micro_batch_size=micro_batch_size, **FULL)
        yield Case("llama3-8b", 8192, eight, layout)
    for micro_batch_size in (1, 2):
        yield Case("olmoe-7b", 4096, eight, Layout(ep=8, micro_batch_size=micro_batch_size))


def predicted(case: Case, workload: Workload) -> dict[str, float]:
    """Return the peak of pipeline rank 0 in GiB, as predicted with Transformer Engine and with torch alone."""
    return {
        implementation: max(
            stage.total_gib
            for stage in memory_breakdown(case.layout, workload, case.cluster, implementation)
            if stage.rank == 0
        )
        for implementation in ("transformer_engine", "torch")
    }


def measured(case: Case, workload: Workload, device: torch.device | None) -> dict[str, Any]:
    """Return the peaks of rank 0 in GiB, or how far the allocator came before it failed."""
    if device:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{case.layout.expandable_segments}")
    try:
        world_size = case.cluster.world_size
        allocated, reserved = probe(workload, case.layout, world_size, 0, device=device, as_gloo=False)
    except Exception as error:  # the other cases still run
        reached = torch.cuda.max_memory_allocated() / GIB if device else None
        return {"failed": f"{type(error).__name__}: {error}"[:200], "reached_gib": reached}
    return {"allocated_gib": allocated, "reserved_gib": reserved}


def main() -> None:
    """Print the size of CUDA's context and then each case."""
    device = prepare(load_cluster("dgx-h100"))
    used_gib = _used_gib if device else lambda: 0.0
    before_gib = used_gib()
    if device:
        torch.zeros(1, device=device) @ torch.zeros(1, device=device)
        torch.cuda.synchronize()
        context_gib = used_gib() - before_gib - torch.cuda.memory_reserved() / GIB
        _print(what="context", context_gib=context_gib, torch=torch.__version__)
    for case in cases():
        workload = Workload(
            model=load_model(case.model),
            seq_length=case.seq_length,
            global_batch_size=16 * case.cluster.world_size,
        )
        began_s = time.monotonic()
        line = {"model": case.model, "seq_length": case.seq_length, "world_size": case.cluster.world_size}
        line |= {
            "layout": case.layout.label(),
            **predicted(case, workload),
            **measured(case, workload, device),
        }
        line["used_by_nvml_gib"] = used_gib() - before_gib
        gc.collect()
        if device:
            torch.cuda.empty_cache()
        _print(what="memory", **line, took_s=round(time.monotonic() - began_s, 1))


def _used_gib() -> float:
    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / GIB


def _print(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
