"""Measurements that others published, as workloads, clusters and tables of layouts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from search_spaces.loader import load_cluster, load_model
from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Floats
from tuner.core.layout import DEFAULTS, KNOBS
from tuner.core.workload import Model, Precision, Workload
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts

DATA: Final = Path(__file__).parents[3] / "shared" / "data"
STEP_TIMES: Final = DATA / "a100_step_times.csv"
PUBLISHED: Final = DATA / "published_layouts.csv"
GROUP: Final = ["hidden_size", "num_layers", "gpus", "global_batch_size"]
"""The columns of the recorded step times that say to which group a row belongs."""
LARGE_GROUP: Final = 20
"""Fewest rows of a group whose ranking says something. Assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A tuning problem of which every recorded layout was measured."""

    name: str
    workload: Workload
    cluster: Cluster
    table: pd.DataFrame
    """One row per layout, columns as KNOBS."""
    measured_ms: Floats
    """The measured step times, of shape [layouts]."""


def groups(path: Path = STEP_TIMES, rows: int = 1) -> Iterator[Group]:
    """Yield the groups of at least `rows` rows in a file of step times (the ground truth of VIA-Research/vTrain)."""
    for key, part in pd.read_csv(path).groupby(GROUP):
        if len(part) < rows:
            continue
        first = part.iloc[0]
        workload = Workload(
            model=_gpt(first),
            seq_length=int(first.seq_length),
            global_batch_size=int(first.global_batch_size),
            precision="fp16",
            grad_reduce_in_fp32=False,  # as in DeepSpeed
        )
        gpus = int(first.gpus)
        cluster = replace(load_cluster("dgx-a100-80"), nodes=max(1, gpus // 8), gpus_per_node=min(gpus, 8))
        measured = part["step_time_ms"].to_numpy(dtype=np.float64)
        name = "-".join(map(str, key))
        yield Group(name=name, workload=workload, cluster=cluster, table=_layouts(part), measured_ms=measured)


def _gpt(row: Any) -> Model:
    """Return GPT as Megatron-DeepSpeed builds it; the source states no more than these sizes."""
    return Model(
        name=f"gpt-{row.hidden_size:.0f}-{row.num_layers:.0f}",
        num_layers=int(row.num_layers),
        hidden_size=int(row.hidden_size),
        ffn_hidden_size=4 * int(row.hidden_size),
        num_attention_heads=int(row.num_attention_heads),
        num_query_groups=int(row.num_attention_heads),
        kv_channels=int(row.hidden_size) // int(row.num_attention_heads),
        vocab_size=50257,
        gated_linear_unit=False,
        activation_func="gelu",
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        max_position_embeddings=int(row["seq_length"]),
        share_embeddings_and_output_weights=True,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


def _layouts(part: pd.DataFrame) -> pd.DataFrame:
    """Return the layouts of recorded rows, texts as categories."""
    table = pd.DataFrame({knob: [DEFAULTS[knob]] * len(part) for knob in KNOBS})
    for knob in ("tp", "pp", "micro_batch_size"):
        table[knob] = part[knob].to_numpy()
    table = table.assign(
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        use_distributed_optimizer=False,
    )
    return table.astype({knob: "category" for knob, default in DEFAULTS.items() if isinstance(default, str)})


MODELS: Final = {
    "LLAMA3_70B": "llama3-70b",
    "GPT OSS 120B": "gpt-oss-120b",
    "Qwen3_30B_a3B": "qwen3-30b-a3b",
}
SYSTEMS: Final = {
    "DGX-GB300": "gb300-nvl72",
    "DGX-GB200": "gb200-nvl72",
    "DGX-B300": "dgx-b300",
    "DGX-B200": "dgx-b200",
    "DGX-H100": "dgx-h100",
}
AXES: Final = ["tp", "pp", "cp", "vpp", "ep", "micro_batch_size"]
"""The knobs that the published tables state."""
PROBLEM: Final = ["model", "system", "precision", "gpus", "global_batch_size", "seq_length", "vpp", "fsdp"]
"""The columns of the published layouts that say which table of layouts one is compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A tuned layout with its measured throughput, and the valid layouts that differ in what its source leaves open."""

    name: str
    workload: Workload
    cluster: Cluster
    table: pd.DataFrame
    """Every valid layout that varies the published axes and what the published tables leave open: recompute, and for
    mixtures of experts CUDA graphs and the token dispatcher; if the published layout had FSDP, with and without it."""
    is_published: Bools
    """Which rows of the table the published layout may have been."""
    measured_ms: float
    """The step time that follows from the published throughput."""
    comparable: bool
    """Whether all parameters were trained, as the predictions assume."""


def published(path: Path = PUBLISHED) -> Iterator[Published]:
    """Yield every published layout (NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md)."""
    tables: dict[tuple[Any, ...], pd.DataFrame] = {}
    for row in _rows(path):
        workload, cluster = _problem(row)
        key = tuple(row[name] for name in PROBLEM)
        if key not in tables:
            tables[key] = _open_choices(workload, cluster, int(row["vpp"]), row["fsdp"] > 0)
        table = tables[key]
        wanted = [row[axis] for axis in AXES]
        is_published = (table[AXES] == wanted).all(axis=1) & (table["use_megatron_fsdp"] == (row["fsdp"] > 0))
        tokens_per_s = row["tokens_per_s_per_gpu"] * row["gpus"]
        yield Published(
            name=f"{row['release']} {row['model']} {row['system']} {row['precision']}",
            workload=workload,
            cluster=cluster,
            table=table,
            is_published=is_published.to_numpy(),
            measured_ms=workload.tokens_per_step / tokens_per_s * 1e3,
            comparable=row["task"] != "LoRA",
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in pd.read_csv(path).to_dict("records")]


_model, _cluster = cache(load_model), cache(load_cluster)


def _problem(row: Mapping[str, Any]) -> tuple[Workload, Cluster]:
    model, cluster = _model(MODELS[row["model"]]), _cluster(SYSTEMS[row["system"]])
    precision: Precision = row["precision"].lower()
    workload = Workload(
        model=model,
        seq_length=int(row["seq_length"]),
        global_batch_size=int(row["global_batch_size"]),
        precision=precision,
        # All of these recipes do so: scripts/performance/configs, and mixed_precision.py (fp8_param_gather).
        grad_reduce_in_fp32=False,
        fp8_param=precision in {"fp8", "mxfp8"},
        moe_router_force_load_balancing=model.is_moe,
    )
    return workload, replace(cluster, nodes=int(row["gpus"]) // cluster.gpus_per_node)


def _open_choices(workload: Workload, cluster: Cluster, vpp: int, fsdp: bool) -> pd.DataFrame:
    """Return the table of a Published, which is shared by all that agree in PROBLEM."""
    domain = default_domain(workload, cluster)
    varied = {knob: domain[knob] for knob in (*AXES, "sp", "overlap_p2p_comm")}
    return enumerate_layouts(
        workload,
        cluster,
        {
            **varied,
            "vpp": tuple(sorted({*varied["vpp"], vpp})),
            "recompute_granularity": ("none", "selective", "full"),
            # The modules that these models' recipes recompute (scripts/performance/configs), and Megatron's default.
            "recompute_modules": ("none", "layernorm+moe_act" if workload.model.is_moe else "layernorm"),
            "recompute_method": ("none", "uniform"),
            "recompute_num_layers": (0, 1),
            "overlap_grad_reduce": (True,),
            "overlap_param_gather": (True,),
            "moe_token_dispatcher_type": ("flex" if workload.model.is_moe else "alltoall",),
            "moe_flex_dispatcher_backend": ("deepep", "hybridep") if workload.model.is_moe else ("deepep",),
            "cuda_graph_impl": ("none", "transformer_engine") if workload.model.is_moe else ("none",),
            "cuda_graph_scope": ("none", "attn+moe_router+moe_preprocess"),
            "use_megatron_fsdp": (False, True) if fsdp else (False,),
            "data_parallel_sharding_strategy": ("no_shard", "optim_grads_params") if fsdp else ("no_shard",),
        },
    ).table
