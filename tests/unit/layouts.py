"""Small models, workloads and clusters, which the unit tests of several rooms share."""

from dataclasses import replace
from typing import Any

from tuner.core.cluster import Cluster, Gpu
from tuner.core.workload import Model, Workload


def dense(**fields: Any) -> Model:
    """A dense model of 8 layers and 8 attention heads; `fields` replaces some of its fields."""
    base = Model(
        name="test-dense",
        num_layers=8,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=1000,
    )
    return replace(base, **fields)


def mixture(**fields: Any) -> Model:
    """The dense model with 8 experts and a shared expert in every layer; `fields` replaces some of its fields."""
    experts = {
        "name": "test-mixture",
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 48,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": 48,
    }
    return dense(**{**experts, **fields})


def latent(**fields: Any) -> Model:
    """The mixture with multi-latent attention and a dense first layer; `fields` replaces some of its fields."""
    attention = {
        "name": "test-latent",
        "multi_latent_attention": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "moe_layer_freq": (0, *(1,) * 7),
    }
    return mixture(**{**attention, **fields})


def workload(model: Model, **fields: Any) -> Workload:
    """A job with 32 samples of 64 tokens per step; `fields` replaces some of its fields."""
    return replace(Workload(model=model, seq_length=64, global_batch_size=32), **fields)


def cluster(gpus: int, **fields: Any) -> Cluster:
    """A node of `gpus` H100 in one NVLink domain; `fields` replaces some of its fields."""
    base = Cluster(
        name=f"test-{gpus}",
        gpu=Gpu(name="H100", memory_gib=80, peak_tflops={"bf16": 989}, memory_bandwidth_gb_per_s=3350),
        gpus_per_node=gpus,
        nvlink_domain_gpus=gpus,
        nvlink_bandwidth_gb_per_s=450,
        nvlink_latency_us=5,
        fabric_bandwidth_gb_per_s=50,
        fabric_latency_us=10,
    )
    return replace(base, **fields)
