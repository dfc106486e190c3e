"""For every rule a layout that breaks it: the unit tests ask the rules, the oracle asks Megatron."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.cluster import Cluster
from tuner.core.workload import Workload

DENSE, MIXTURE = workload(dense()), workload(mixture())
LATENT = workload(
    dense(
        multi_latent_attention=True,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
    )
)
FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EXPERT_OVERLAP: dict[str, Any] = {"overlap_moe_expert_parallel_comm": True}
SHARDED: dict[str, Any] = {
    "use_megatron_fsdp": True,
    "data_parallel_sharding_strategy": "optim_grads_params",
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
ONE_GPU = cluster(1)
GRACE = cluster(8, gpu=replace(cluster(8).gpu, name="GB200"))


def on_cpu(gpus: int) -> Cluster:
    """A cluster of CPU ranks."""
    return cluster(gpus, device="cpu")


def graph(impl: str, scope: str = "none") -> dict[str, Any]:
    """The knobs of CUDA graphs."""
    return {"cuda_graph_impl": impl, "cuda_graph_scope": scope}


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleCase:
    """A layout that breaks a rule."""

    rule: str
    """The rule's id."""
    knobs: Mapping[str, Any]
    """The layout's knobs; those left out keep their default."""
    workload: Workload
    cluster: Cluster
    words: str
    """A part of the rule's message, with the numbers of this layout."""


def case(
    rule: str, words: str, *, workload: Workload = DENSE, cluster: Cluster = ONE_GPU, **knobs: Any
) -> RuleCase:
    """A case of a rule, by default with the dense model on one GPU."""
    return RuleCase(rule=rule, knobs=knobs, workload=workload, cluster=cluster, words=words)


CASES: tuple[RuleCase, ...] = (
    case(
        "dense-grid", "world size (16) % (tp*pp*cp = 2*4*3 = 24) = 16", cluster=cluster(16), tp=2, pp=4, cp=3
    ),
    case(
        "expert-grid",
        "(pp*ep*etp = 2*4*2 = 16) = 8, must be 0",
        workload=MIXTURE,
        cluster=cluster(24),
        ep=4,
        pp=2,
        etp=2,
    ),
    case(
        "tp-inside-nvlink",
        "nvlink_domain_gpus (4) % (tp = 8) = 4",
        cluster=cluster(8, nvlink_domain_gpus=4),
        tp=8,
    ),
    case(
        "etp-inside-nvlink",
        "nvlink_domain_gpus (2) % (etp = 4) = 2",
        workload=MIXTURE,
        cluster=cluster(8, nvlink_domain_gpus=2),
        etp=4,
        ep=2,
    ),
    case("heads-by-tp", "num_attention_heads (8) % (tp = 3) = 2", cluster=cluster(3), tp=3),
    case(
        "query-groups-by-tp",
        "6 % 4 = 2 and 4 % 6 = 4",
        workload=workload(dense(num_attention_heads=12, num_query_groups=6)),
        cluster=cluster(4),
        tp=4,
    ),
    case(
        "qkv-width-by-tp",
        "kv_channels*(heads + 2*groups) = 3*(8 + 2*1) (30) % (tp = 8) = 6",
        workload=workload(dense(num_query_groups=1, kv_channels=3)),
        cluster=cluster(8),
        tp=8,
    ),
    case("mla-tp-needs-sp", "tp (2) and without sp", workload=LATENT, cluster=cluster(2), tp=2),
    case(
        "ffn-by-tp",
        "ffn_hidden_size (90) % (tp = 4) = 2",
        workload=workload(dense(ffn_hidden_size=90)),
        cluster=cluster(4),
        tp=4,
    ),
    case(
        "shared-expert-ffn-by-tp",
        "moe_shared_expert_intermediate_size (42) % (tp = 4) = 2",
        workload=workload(mixture(moe_shared_expert_intermediate_size=42)),
        cluster=cluster(4),
        tp=4,
        sp=True,
    ),
    case(
        "moe-ffn-by-etp",
        "moe_ffn_hidden_size (42) % (etp = 4) = 2",
        workload=workload(mixture(moe_ffn_hidden_size=42)),
        cluster=cluster(8),
        etp=4,
        ep=2,
    ),
    case("sp-needs-tp", "tp is 1", sp=True),
    case("sequence-by-cp", "seq_length (64) % (2*cp = 2*3 = 6) = 4", cluster=cluster(3), cp=3),
    case(
        "sequence-by-tp-cp",
        "seq_length (36) % (tp*cp = 8*2 = 16) = 4, must be 0",
        workload=workload(dense(), seq_length=36),
        cluster=cluster(16),
        tp=8,
        sp=True,
        cp=2,
    ),
    case(
        "window-refuses-p2p",
        "window of (7, 0)",
        workload=workload(dense(window_size=(7, 0))),
        cluster=cluster(4),
        cp=2,
    ),
    case(
        "precision-needs-cuda",
        "precision fp8",
        workload=workload(dense(), precision="fp8"),
        cluster=on_cpu(1),
    ),
    case("ep-needs-experts", "ep is 2", cluster=cluster(2), ep=2),
    case("etp-needs-experts", "etp is 2", cluster=cluster(2), etp=2),
    case(
        "etp-is-tp-without-ep",
        "etp (1) is not tp (2): set etp to 2",
        workload=MIXTURE,
        cluster=cluster(2),
        tp=2,
        sp=True,
    ),
    case("experts-by-ep", "num_moe_experts (8) % (ep = 3) = 2", workload=MIXTURE, cluster=cluster(3), ep=3),
    case("moe-tp-needs-sp", "tp (2) > 1", workload=MIXTURE, cluster=cluster(2), tp=2, ep=2),
    case(
        "moe-bias-needs-etp-1",
        "etp is 2",
        workload=workload(mixture(add_bias_linear=True)),
        cluster=cluster(4),
        ep=2,
        etp=2,
    ),
    case("dispatcher-needs-experts", "is allgather", moe_token_dispatcher_type="allgather"),
    case("deepep-needs-expert-ranks", "it is 1*1 = 1", workload=MIXTURE, moe_token_dispatcher_type="flex"),
    case(
        "hybridep-needs-expert-ranks",
        "it is 1*1 = 1",
        workload=MIXTURE,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
    ),
    case(
        "flex-needs-deepep",
        "needs DeepEP",
        workload=MIXTURE,
        cluster=on_cpu(2),
        moe_token_dispatcher_type="flex",
        ep=2,
    ),
    case(
        "shared-overlap-needs-shared-experts",
        "test-mixture has no shared experts",
        workload=workload(mixture(moe_shared_expert_intermediate_size=None)),
        moe_shared_expert_overlap=True,
    ),
    case(
        "shared-overlap-excludes-allgather",
        "the dispatcher allgather",
        workload=MIXTURE,
        moe_shared_expert_overlap=True,
        moe_token_dispatcher_type="allgather",
    ),
    case(
        "shared-overlap-excludes-flex",
        "the dispatcher flex",
        workload=MIXTURE,
        cluster=cluster(2),
        ep=2,
        moe_shared_expert_overlap=True,
        moe_token_dispatcher_type="flex",
    ),
    case(
        "shared-overlap-excludes-recompute",
        "recompute_modules shared_experts",
        workload=MIXTURE,
        moe_shared_expert_overlap=True,
        recompute_granularity="selective",
        recompute_modules="shared_experts",
    ),
    case("top-1-needs-pre-softmax", "moe_router_topk is 1", workload=workload(mixture(moe_router_topk=1))),
    case(
        "expert-bias-needs-sigmoid",
        "not softmax",
        workload=workload(mixture(moe_router_enable_expert_bias=True)),
    ),
    case(
        "router-groups",
        "moe_router_num_groups (3) to be at least as large, and to divide num_moe_experts (8)",
        workload=workload(mixture(moe_router_num_groups=3, moe_router_group_topk=2)),
    ),
    case(
        "expert-bias-needs-cuda",
        "test-mixture",
        workload=workload(mixture(add_bias_linear=True)),
        cluster=on_cpu(1),
    ),
    case("vpp-needs-pp", "vpp is 2, but pp is 1", vpp=2),
    case(
        "uneven-split-needs-pp", "pp is 1: one stage holds all 8 layers", num_layers_in_first_pipeline_stage=8
    ),
    case(
        "uneven-split-needs-pp",
        "pp is 1: one stage holds all 8 layers",
        account_for_embedding_in_pipeline_split=True,
    ),
    case(
        "uneven-or-accounted",
        "first (1) or last (1) is stated",
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=1,
        account_for_loss_in_pipeline_split=True,
    ),
    case("layers-by-pp", "num_layers (8) % (pp = 3) = 2", cluster=cluster(3), pp=3),
    case(
        "layers-by-pp",
        "num_layers + 1 accounted slots (9) % (pp = 4) = 1",
        cluster=cluster(4),
        pp=4,
        account_for_loss_in_pipeline_split=True,
    ),
    case(
        "uneven-rest-by-stages",
        "num_layers (8) - first (1) - last (0) = 7 layers do not divide evenly among the 3 stages left of pp (4)",
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=1,
    ),
    case(
        "uneven-rest-by-stages",
        "= -4 layers do not divide evenly among the 2 stages left",
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=7,
        num_layers_in_last_pipeline_stage=5,
    ),
    case(
        "stage-layers-by-vpp",
        "vpp (3) must divide the layers of every pipeline rank (first 4, middle 4, last 4",
        cluster=cluster(2),
        pp=2,
        vpp=3,
        overlap_p2p_comm=True,
    ),
    case(
        "uneven-chunks-need-a-middle",
        "first (2) and last (6) both stated",
        cluster=cluster(2),
        pp=2,
        vpp=2,
        num_layers_in_first_pipeline_stage=2,
        num_layers_in_last_pipeline_stage=6,
        overlap_p2p_comm=True,
    ),
    case(
        "uneven-split-says-something",
        "first (2) or last (0) repeats",
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=2,
    ),
    case(
        "uneven-split-says-something",
        "with two stages only the first",
        cluster=cluster(2),
        pp=2,
        num_layers_in_last_pipeline_stage=3,
    ),
    case(
        "uneven-split-not-as-accounted",
        "first (2) and last (2) of 10 layers on pp 4 are one layer short",
        workload=workload(dense(num_layers=10)),
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=2,
        num_layers_in_last_pipeline_stage=2,
    ),
    case(
        "accounted-split-says-something",
        "with pp 2 and vpp 1",
        cluster=cluster(2),
        pp=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
    case(
        "uneven-split-balanced",
        "even share of 8 layers / pp (4) = 2",
        cluster=cluster(4),
        pp=4,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=5,
    ),
    case(
        "batch-by-micro-batch",
        "global_batch_size (32) % (micro_batch_size*dp = 3*4 = 12) = 8",
        cluster=cluster(4),
        micro_batch_size=3,
    ),
    case(
        "interleaving-group-range",
        "pp = 4, group = 4, micro-batches = 2",
        cluster=cluster(4),
        pp=4,
        vpp=2,
        overlap_p2p_comm=True,
        micro_batch_size=16,
    ),
    case(
        "interleaving-group-remainder",
        "micro-batches (10) % group (4) = 2, which must be 0 or at least pp (4)",
        workload=workload(dense(), global_batch_size=10),
        cluster=cluster(4),
        pp=4,
        vpp=2,
        overlap_p2p_comm=True,
    ),
    case(
        "group-only-if-it-differs",
        "microbatch_group_size_per_vp_stage (4) has no effect with vpp 1 and pp 1",
        microbatch_group_size_per_vp_stage=4,
    ),
    case(
        "full-recompute-needs-method",
        "at least 1 (it is 0)",
        recompute_granularity="full",
        recompute_method="uniform",
    ),
    case(
        "selective-recompute-counts-no-layers",
        "recompute_num_layers is 3",
        recompute_granularity="selective",
        recompute_num_layers=3,
    ),
    case(
        "method-only-with-full-recompute",
        "recompute_method (block) and recompute_num_layers (2)",
        recompute_method="block",
        recompute_num_layers=2,
    ),
    case(
        "modules-only-with-selective-recompute",
        "recompute_modules (layernorm) is read with selective recompute only, not full",
        **FULL,
        recompute_modules="layernorm",
    ),
    case(
        "recompute-modules-known",
        "names attn; known are core_attn",
        recompute_granularity="selective",
        recompute_modules="attn",
    ),
    case(
        "recompute-modules-in-order",
        "recompute_modules (mlp+layernorm)",
        recompute_granularity="selective",
        recompute_modules="mlp+layernorm",
    ),
    case(
        "recompute-modules-in-order",
        "core_attn alone as none",
        recompute_granularity="selective",
        recompute_modules="core_attn",
    ),
    case(
        "recompute-modules-in-model",
        "test-dense has no moe to recompute",
        recompute_granularity="selective",
        recompute_modules="moe",
    ),
    case(
        "mla-up-proj-needs-mla",
        "names mla_up_proj, but test-dense has no multi-latent attention",
        recompute_granularity="selective",
        recompute_modules="mla_up_proj",
    ),
    case(
        "mlp-recompute-needs-no-bias",
        "recompute_modules (mlp) names mlp, but test-dense has biases",
        workload=workload(dense(add_bias_linear=True)),
        recompute_granularity="selective",
        recompute_modules="mlp",
    ),
    case(
        "moe-act-needs-grouped-gemm",
        "names moe_act",
        workload=MIXTURE,
        cluster=on_cpu(1),
        recompute_granularity="selective",
        recompute_modules="moe_act",
    ),
    case(
        "uniform-recompute-by-chunk",
        "recompute_num_layers (3) must divide the layers of every chunk (first 4, between 4, last 4)",
        cluster=cluster(2),
        pp=2,
        **(FULL | {"recompute_num_layers": 3}),
    ),
    case(
        "block-recompute-below-chunk",
        "recompute_num_layers (4) layers takes every layer of a chunk (at most 4)",
        cluster=cluster(2),
        pp=2,
        **(FULL | {"recompute_method": "block", "recompute_num_layers": 4}),
    ),
    case(
        "mtp-recompute-by-one",
        "recompute_num_layers is 2",
        workload=workload(dense(mtp_num_layers=1)),
        **(FULL | {"recompute_num_layers": 2}),
    ),
    case(
        "p2p-overlap-needs-interleaving", "vpp is 1 (pp 2)", cluster=cluster(2), pp=2, overlap_p2p_comm=True
    ),
    case("p2p-overlap-needs-pp", "pp is 1", overlap_p2p_comm=True),
    case("interleaving-overlaps-p2p", "vpp is 2 without overlap_p2p_comm", cluster=cluster(2), pp=2, vpp=2),
    case(
        "param-gather-overlap-needs-both",
        "use_distributed_optimizer (it is False)",
        cluster=cluster(2),
        overlap_param_gather=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=False,
    ),
    case("tp-overlap-needs-sp", "sp is False (tp 2)", cluster=cluster(2), tp_comm_overlap=True, tp=2),
    case("tp-overlap-needs-cuda", "device is cpu", cluster=on_cpu(2), tp_comm_overlap=True, tp=2, sp=True),
    case("expert-overlap-needs-ep", "needs ep > 1, but it is 1", workload=MIXTURE, **EXPERT_OVERLAP),
    case(
        "expert-overlap-needs-vpp",
        "pp is 2 and vpp 1",
        workload=MIXTURE,
        cluster=cluster(4),
        **EXPERT_OVERLAP,
        ep=2,
        pp=2,
    ),
    case(
        "expert-overlap-needs-all-to-all",
        "not allgather",
        workload=MIXTURE,
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
        moe_token_dispatcher_type="allgather",
    ),
    case(
        "expert-overlap-excludes-full-recompute",
        "granularity full, method uniform, 1 layers",
        workload=MIXTURE,
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        **FULL,
        ep=2,
    ),
    case(
        "expert-overlap-excludes-moe-recompute",
        "recompute_modules is moe",
        workload=MIXTURE,
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
        recompute_granularity="selective",
        recompute_modules="moe",
    ),
    case(
        "expert-overlap-excludes-shared-overlap",
        "excludes moe_shared_expert_overlap",
        workload=MIXTURE,
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
        moe_shared_expert_overlap=True,
    ),
    case(
        "expert-overlap-needs-half-precision",
        "not fp32",
        workload=workload(mixture(), precision="fp32"),
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case(
        "expert-overlap-with-fsdp-excludes-layer-graphs",
        "cuda_graph_impl is transformer_engine and cuda_graph_scope attn",
        workload=MIXTURE,
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        **SHARDED,
        **graph("transformer_engine", "attn"),
        ep=2,
    ),
    case(
        "expert-overlap-needs-one-mtp-layer",
        "the model has 2",
        workload=workload(mixture(mtp_num_layers=2)),
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case(
        "expert-overlap-of-mtp-needs-pp",
        "needs pp > 1 with multi-token prediction, and pp is 1",
        workload=workload(mixture(mtp_num_layers=1)),
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case(
        "delayed-wgrad-needs-expert-overlap",
        "needs overlap_moe_expert_parallel_comm",
        workload=MIXTURE,
        delay_wgrad_compute=True,
    ),
    case(
        "delayed-wgrad-needs-cuda",
        "delay_wgrad_compute needs Transformer Engine",
        workload=MIXTURE,
        cluster=on_cpu(2),
        **EXPERT_OVERLAP,
        delay_wgrad_compute=True,
        ep=2,
    ),
    case("cp-comm-type-needs-cp", "cp is 1", cp_comm_type="a2a"),
    case(
        "cp-comm-type-needs-cuda", "a2a needs Transformer Engine", cluster=on_cpu(2), cp=2, cp_comm_type="a2a"
    ),
    case("a2a-heads-by-cp", "num_query_groups (4) % 8 = 4", cluster=cluster(8), cp=8, cp_comm_type="a2a"),
    case(
        "unlike-values-need-p2p",
        "keys (8+4 wide)",
        workload=LATENT,
        cluster=cluster(2),
        cp=2,
        cp_comm_type="all_gather",
    ),
    case(
        "sinks-need-a2a",
        "not with p2p",
        workload=workload(dense(softmax_type="learnable")),
        cluster=cluster(2),
        cp=2,
    ),
    case("flex-backend-needs-flex", "is alltoall", workload=MIXTURE, moe_flex_dispatcher_backend="hybridep"),
    case(
        "flex-backend-runs-on-gpu",
        "deepep does not run on GB200",
        workload=MIXTURE,
        cluster=GRACE,
        moe_token_dispatcher_type="flex",
        ep=8,
    ),
    case("variables-need-cuda", "expandable_segments (True)", cluster=on_cpu(1), expandable_segments=True),
    case("connections-in-range", "is 64: CUDA takes 1 to 32", cuda_device_max_connections=64),
    case(
        "tp-and-cp-want-one-connection",
        "is 8, but tp*cp = 2*1 on H100 needs 1",
        cluster=cluster(2),
        tp=2,
        sp=True,
        cuda_device_max_connections=8,
    ),
    case(
        "fsdp-wants-connections",
        "refuses cuda_device_max_connections 1",
        cluster=cluster(2),
        **SHARDED,
        cuda_device_max_connections=1,
    ),
    case("graphs-need-cuda", "device is cpu", cluster=on_cpu(1), **graph("transformer_engine")),
    case("graph-scope-needs-graphs", "cuda_graph_scope is attn", **graph("none", "attn")),
    case("graph-scope-known", "names attention; known", **graph("transformer_engine", "attention")),
    case("graph-scope-in-order", "(mlp+attn) must name", **graph("transformer_engine", "mlp+attn")),
    case("full-iteration-graph-alone", "captures all the rest", **graph("local", "full_iteration+attn")),
    case(
        "full-iteration-graph-needs-local",
        "needs cuda_graph_impl local",
        **graph("transformer_engine", "full_iteration"),
    ),
    case("local-graph-of-full-iteration", "scope to full_iteration", **graph("local", "attn")),
    case("moe-graph-needs-experts", "has none", **graph("transformer_engine", "moe_router")),
    case(
        "moe-graph-needs-padding",
        "drop tokens and pad",
        workload=MIXTURE,
        **graph("transformer_engine", "moe"),
    ),
    case(
        "moe-preprocess-graph-needs-router",
        "without moe_router",
        workload=MIXTURE,
        **graph("transformer_engine", "moe_preprocess"),
    ),
    case(
        "local-graph-of-router-and-preprocess", "name both", workload=MIXTURE, **graph("local", "moe_router")
    ),
    case("mlp-graph-needs-dense-layers", "mlp", workload=MIXTURE, **graph("transformer_engine", "mlp")),
    case(
        "whole-layer-graph-of-experts", "follow the routing", workload=MIXTURE, **graph("transformer_engine")
    ),
    case("graphs-exclude-full-recompute", "full recompute", **graph("transformer_engine"), **FULL),
    case(
        "router-graph-excludes-moe-recompute",
        "drop moe",
        workload=MIXTURE,
        **graph("transformer_engine", "moe_router"),
        recompute_granularity="selective",
        recompute_modules="moe",
    ),
    case(
        "expert-overlap-excludes-local-graphs",
        "need cuda_graph_impl transformer_engine",
        workload=MIXTURE,
        cluster=cluster(2),
        **graph("local", "full_iteration"),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case(
        "expert-overlap-graph-scope",
        "no graph captures moe or mlp",
        workload=MIXTURE,
        cluster=cluster(2),
        **graph("transformer_engine", "moe"),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case("fsdp-needs-cuda", "needs CUDA streams", cluster=on_cpu(2), **SHARDED),
    case(
        "sharding-needs-fsdp",
        "is optim, but use_megatron_fsdp is off",
        cluster=cluster(2),
        data_parallel_sharding_strategy="optim",
    ),
    case("fsdp-shards", "keeps everything on every rank", cluster=cluster(2), use_megatron_fsdp=True),
    case(
        "fsdp-shards-the-optimizer",
        "turns use_distributed_optimizer on",
        cluster=cluster(2),
        **SHARDED,
        use_distributed_optimizer=False,
    ),
    case(
        "fsdp-overlaps",
        "overlap_param_gather False",
        cluster=cluster(2),
        **(SHARDED | {"overlap_param_gather": False}),
    ),
    case(
        "offload-needs-cuda", "cpu_offloading_num_layers (2)", cluster=on_cpu(1), cpu_offloading_num_layers=2
    ),
    case("offload-below-layers", "(8) must be below num_layers (8)", cpu_offloading_num_layers=8),
    case("offload-excludes-pp", "but pp is 2", cluster=cluster(2), cpu_offloading_num_layers=2, pp=2),
    case("offload-excludes-recompute", "is full", cpu_offloading_num_layers=2, **FULL),
    case(
        "offload-excludes-graphs",
        "cuda_graph_impl is transformer_engine",
        cpu_offloading_num_layers=2,
        **graph("transformer_engine"),
    ),
    case(
        "offload-excludes-full-iteration-graph",
        "cuda_graph_scope full_iteration",
        cpu_offloading_num_layers=2,
        **graph("local", "full_iteration"),
    ),
    case("nccl-ub-needs-cuda", "registers buffers with NCCL", cluster=on_cpu(1), nccl_ub=True),
    case("nccl-ub-excludes-expandable-segments", "memory pool", nccl_ub=True, expandable_segments=True),
    case("layers-placed-with-pp", "pp is 1", pipeline_model_parallel_layout="Et*8L"),
    case(
        "layers-placed-whole",
        "places 7 decoder layers",
        cluster=cluster(2),
        pp=2,
        pipeline_model_parallel_layout="Et*4|t*3L",
    ),
    case(
        "layers-placed-by-pp",
        "has 3 chunks, but pp*vpp = 2*1 = 2",
        cluster=cluster(2),
        pp=2,
        pipeline_model_parallel_layout="Et*2|t*3|t*3L",
    ),
    case(
        "layers-placed-by-chunks",
        "has 4 chunks, but pp*vpp = 2*3 = 6",
        cluster=cluster(2),
        pp=2,
        vpp=3,
        pipeline_model_parallel_layout="Et|t*3|t*2|t*2L",
        overlap_p2p_comm=True,
    ),
    case(
        "layers-placed-with-vpp",
        "has 4 chunks, but pp*vpp = 2*1 = 2",
        cluster=cluster(2),
        pp=2,
        pipeline_model_parallel_layout="Et|t*3|t*2|t*2L",
    ),
    case(
        "expert-overlap-ends-with-experts",
        "layer 8, the last, has no experts",
        workload=workload(mixture(moe_layer_freq=2)),
        cluster=cluster(2),
        **EXPERT_OVERLAP,
        ep=2,
    ),
    case(
        "expert-overlap-needs-two-experts",
        "only expert (num_moe_experts / ep = 8 / 8)",
        workload=MIXTURE,
        cluster=cluster(8),
        **EXPERT_OVERLAP,
        ep=8,
    ),
    case(
        "mtp-placed-on-last-chunks",
        "one of the last 2",
        workload=workload(dense(mtp_num_layers=1)),
        cluster=cluster(2),
        pp=2,
        vpp=2,
        overlap_p2p_comm=True,
        pipeline_model_parallel_layout="Et*8|m||L",
    ),
    case(
        "layers-placed-or-uneven",
        "first (5)",
        cluster=cluster(2),
        pp=2,
        pipeline_model_parallel_layout="Et*5|t*3L",
        num_layers_in_first_pipeline_stage=5,
    ),
    case(
        "layers-placed-or-accounted",
        "account_for_* is on",
        cluster=cluster(4),
        pp=4,
        pipeline_model_parallel_layout="Et|t*3|t*3|tL",
        account_for_embedding_in_pipeline_split=True,
    ),
    case(
        "layers-placed-say-something",
        "an even split",
        cluster=cluster(2),
        pp=2,
        pipeline_model_parallel_layout="Et*4|t*4L",
    ),
)
