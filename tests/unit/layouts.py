"""Nouns of the tests of rules and space."""

from dataclasses import replace
from typing import Any

from tuner.core.cluster import Cluster, Gpu
from tuner.core.workload import Model, Workload


def dense(**fields: Any) -> Model:
    """A dense model of 8 layers and 8 heads."""
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
    """The same with 8 experts and a shared one in every layer."""
    experts = {
        "name": "test-mixture",
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 48,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": 48,
    }
    return dense(**{**experts, **fields})


def latent(**fields: Any) -> Model:
    """A mixture with multi-latent attention and a leading dense layer."""
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
    """32 samples of 64 tokens a step."""
    return replace(Workload(model=model, seq_length=64, global_batch_size=32), **fields)


def cluster(gpus: int, **fields: Any) -> Cluster:
    """A CUDA cluster in one NVLink domain."""
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
