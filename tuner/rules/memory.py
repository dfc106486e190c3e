"""What trades memory beyond recompute: Megatron-FSDP, activations offloaded to the host, registered buffers."""

from tuner.core.layout import Layout
from tuner.rules.rule import Rule, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG

ARGUMENTS = "megatron/training/arguments.py, validate_args"
FSDP = "megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py"
SHARDING = "use_megatron_fsdp data_parallel_sharding_strategy"


def _on_cpu(what: str) -> str:
    return f"{what}, but the cluster's device is cpu"


def _overlaps(x: Layout) -> str:
    return f"overlap_grad_reduce is {x.overlap_grad_reduce}, overlap_param_gather {x.overlap_param_gather}"


RULES: tuple[Rule, ...] = (
    rule(
        "fsdp-needs-cuda",
        "program",
        "use_megatron_fsdp",
        holds=lambda c, w, k: k.device == "cuda" or ~c.on("use_megatron_fsdp"),
        message=lambda x, w, k: f"{_on_cpu('use_megatron_fsdp needs CUDA streams')}: turn it off",
        source=FSDP,
    ),
    rule(
        "sharding-needs-fsdp",
        "canonical",
        SHARDING,
        holds=lambda c, w, k: (
            c.on("use_megatron_fsdp") | c.among("data_parallel_sharding_strategy", "no_shard")
        ),
        message=lambda x, w, k: (
            f"data_parallel_sharding_strategy is {x.data_parallel_sharding_strategy}, but use_megatron_fsdp is off: "
            "set it to no_shard"
        ),
        source="megatron/core/distributed/distributed_data_parallel_config.py",
    ),
    rule(
        "fsdp-shards",
        "policy",
        SHARDING,
        holds=lambda c, w, k: (
            ~c.on("use_megatron_fsdp") | ~c.among("data_parallel_sharding_strategy", "no_shard")
        ),
        message=lambda x, w, k: (
            "use_megatron_fsdp with data_parallel_sharding_strategy no_shard keeps everything on every rank, as plain "
            "data parallelism does: choose optim_grads_params, optim_grads or optim, or lift this rule"
        ),
        source=FSDP,
    ),
    rule(
        "fsdp-shards-the-optimizer",
        "canonical",
        "use_megatron_fsdp use_distributed_optimizer",
        holds=lambda c, w, k: ~c.on("use_megatron_fsdp") | c.on("use_distributed_optimizer"),
        message=lambda x, w, k: "use_megatron_fsdp turns use_distributed_optimizer on by itself: write it so",
        source=f"{ARGUMENTS}; Megatron Bridge, training/config.py",
    ),
    rule(
        "fsdp-overlaps",
        "canonical",
        f"{SHARDING} overlap_grad_reduce overlap_param_gather",
        holds=lambda c, w, k: (
            ~c.on("use_megatron_fsdp")
            | (
                (
                    ~c.among("data_parallel_sharding_strategy", "optim_grads", "optim_grads_params")
                    | c.on("overlap_grad_reduce")
                )
                & (
                    ~c.among("data_parallel_sharding_strategy", "optim_grads_params")
                    | c.on("overlap_param_gather")
                )
            )
        ),
        message=lambda x, w, k: (
            f"{_overlaps(x)}: Megatron-FSDP turns the first on where it shards gradients, both where it shards "
            f"weights ({x.data_parallel_sharding_strategy}); write it so"
        ),
        source=FSDP,
    ),
    rule(
        "offload-needs-cuda",
        "program",
        "cpu_offloading_num_layers",
        holds=lambda c, w, k: k.device == "cuda" or c["cpu_offloading_num_layers"] == 0,
        message=lambda x, w, k: (
            f"{_on_cpu(f'cpu_offloading_num_layers ({x.cpu_offloading_num_layers}) needs Transformer Engine')}: set it "
            "to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-below-layers",
        "megatron",
        "cpu_offloading_num_layers",
        holds=lambda c, w, k: c["cpu_offloading_num_layers"] < w.model.num_layers,
        message=lambda x, w, k: (
            f"cpu_offloading_num_layers ({x.cpu_offloading_num_layers}) must be below num_layers "
            f"({w.model.num_layers}): lower it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-pp",
        "megatron",
        "cpu_offloading_num_layers pp",
        holds=lambda c, w, k: (c["cpu_offloading_num_layers"] == 0) | (c["pp"] == 1),
        message=lambda x, w, k: (
            f"cpu_offloading_num_layers ({x.cpu_offloading_num_layers}) excludes pipeline parallelism, but pp is "
            f"{x.pp}: set one of them to none"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-recompute",
        "megatron",
        "cpu_offloading_num_layers recompute_granularity",
        holds=lambda c, w, k: (
            (c["cpu_offloading_num_layers"] == 0) | c.among("recompute_granularity", "none")
        ),
        message=lambda x, w, k: (
            f"cpu_offloading_num_layers ({x.cpu_offloading_num_layers}) excludes recompute, but recompute_granularity "
            f"is {x.recompute_granularity}: choose one of them"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-graphs",
        "megatron",
        "cpu_offloading_num_layers cuda_graph_impl",
        holds=lambda c, w, k: (c["cpu_offloading_num_layers"] == 0) | c.among("cuda_graph_impl", "none"),
        message=lambda x, w, k: (
            f"cpu_offloading_num_layers ({x.cpu_offloading_num_layers}) excludes CUDA graphs, but cuda_graph_impl is "
            f"{x.cuda_graph_impl}: choose one of them"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "nccl-ub-needs-cuda",
        "program",
        "nccl_ub",
        holds=lambda c, w, k: k.device == "cuda" or ~c.on("nccl_ub"),
        message=lambda x, w, k: f"{_on_cpu('nccl_ub registers buffers with NCCL')}: turn it off",
        source="megatron/core/nccl_allocator.py",
    ),
    rule(
        "nccl-ub-excludes-expandable-segments",
        "megatron",
        "nccl_ub expandable_segments",
        holds=lambda c, w, k: ~(c.on("nccl_ub") & c.on("expandable_segments")),
        message=lambda x, w, k: (
            "nccl_ub takes its buffers from a memory pool, which expandable_segments cannot have: turn one of them off"
        ),
        source="megatron/core/distributed/distributed_data_parallel_config.py",
    ),
)
