"""Rules for other ways to save memory than recomputation: Megatron-FSDP, offloading, and NCCL's registered buffers."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, implies, not_all, rule
from tuner.rules.sources import TRANSFORMER_CONFIG, VALIDATE_ARGS

FSDP = "megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py"
DDP_CONFIG = "megatron/core/distributed/distributed_data_parallel_config.py"
OFFLOAD_AND_GRAPHS = "cpu_offloading_num_layers cuda_graph_impl cuda_graph_scope"
SHARDING_KNOBS = "use_megatron_fsdp data_parallel_sharding_strategy"


def _sharding_has_fsdp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return columns.on("use_megatron_fsdp") | columns.among("data_parallel_sharding_strategy", "no_shard")


def _fsdp_has_sharding(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    unsharded = columns.among("data_parallel_sharding_strategy", "no_shard")
    return not_all(columns.on("use_megatron_fsdp"), unsharded)


def _fsdp_overlaps_what_it_shards(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    shards_weights = columns.among("data_parallel_sharding_strategy", "optim_grads_params")
    shards_gradients = shards_weights | columns.among("data_parallel_sharding_strategy", "optim_grads")
    reduces = implies(shards_gradients, columns.on("overlap_grad_reduce"))
    gathers = implies(shards_weights, columns.on("overlap_param_gather"))
    return implies(columns.on("use_megatron_fsdp"), reduces & gathers)


def _keeps_activations(columns: Columns) -> Bools:
    """Return a mask of the rows where no layer's activations are offloaded to the host."""
    keeps: Bools = columns["cpu_offloading_num_layers"] == 0
    return keeps


def _graphs(columns: Columns, *, whole: bool) -> Bools:
    """Return a mask of the rows with a CUDA graph of the full iteration, or, if not `whole`, with graphs of layers."""
    graphs: Bools = ~columns.among("cuda_graph_impl", "none") & (columns.graphs("full_iteration") == whole)
    return graphs


def _explain_offload_and_graphs(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    return (
        f"cpu_offloading_num_layers ({layout.cpu_offloading_num_layers}) excludes CUDA graphs, but cuda_graph_impl is "
        f"{layout.cuda_graph_impl} and cuda_graph_scope {layout.cuda_graph_scope}: choose one of them"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "fsdp-needs-cuda",
        "program",
        "use_megatron_fsdp",
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or ~columns.on("use_megatron_fsdp"),
        message=lambda layout, workload, cluster: (
            "use_megatron_fsdp needs CUDA streams, but the cluster's device is cpu: turn it off"
        ),
        source=FSDP,
    ),
    rule(
        "sharding-needs-fsdp",
        "canonical",
        SHARDING_KNOBS,
        holds=_sharding_has_fsdp,
        message=lambda layout, workload, cluster: (
            f"data_parallel_sharding_strategy is {layout.data_parallel_sharding_strategy}, but use_megatron_fsdp is "
            "off: set it to no_shard"
        ),
        source=DDP_CONFIG,
    ),
    rule(
        "fsdp-shards",
        "policy",
        SHARDING_KNOBS,
        holds=_fsdp_has_sharding,
        message=lambda layout, workload, cluster: (
            "use_megatron_fsdp with data_parallel_sharding_strategy no_shard keeps everything on every rank, as plain "
            "data parallelism does: choose optim_grads_params, optim_grads or optim, or lift this rule"
        ),
        source=FSDP,
    ),
    rule(
        "fsdp-shards-the-optimizer",
        "canonical",
        "use_megatron_fsdp use_distributed_optimizer",
        holds=lambda columns, workload, cluster: implies(
            columns.on("use_megatron_fsdp"), columns.on("use_distributed_optimizer")
        ),
        message=lambda layout, workload, cluster: (
            "use_megatron_fsdp turns use_distributed_optimizer on by itself: turn it on in the layout"
        ),
        source=f"{VALIDATE_ARGS}; Megatron Bridge, training/config.py",
    ),
    rule(
        "fsdp-overlaps",
        "canonical",
        f"{SHARDING_KNOBS} overlap_grad_reduce overlap_param_gather",
        holds=_fsdp_overlaps_what_it_shards,
        message=lambda layout, workload, cluster: (
            f"overlap_grad_reduce is {layout.overlap_grad_reduce}, overlap_param_gather {layout.overlap_param_gather}: "
            "Megatron-FSDP turns the first on if it shards gradients, and both if it shards weights "
            f"({layout.data_parallel_sharding_strategy}); set them so"
        ),
        source=FSDP,
    ),
    rule(
        "offload-needs-cuda",
        "program",
        "cpu_offloading_num_layers",
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or _keeps_activations(columns),
        message=lambda layout, workload, cluster: (
            f"cpu_offloading_num_layers ({layout.cpu_offloading_num_layers}) needs Transformer Engine, but the "
            "cluster's device is cpu: set it to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-below-layers",
        "megatron",
        "cpu_offloading_num_layers",
        holds=lambda columns, workload, cluster: (
            columns["cpu_offloading_num_layers"] < workload.model.num_layers
        ),
        message=lambda layout, workload, cluster: (
            f"cpu_offloading_num_layers ({layout.cpu_offloading_num_layers}) must be below num_layers "
            f"({workload.model.num_layers}): lower it"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-pp",
        "megatron",
        "cpu_offloading_num_layers pp",
        holds=lambda columns, workload, cluster: _keeps_activations(columns) | (columns["pp"] == 1),
        message=lambda layout, workload, cluster: (
            f"cpu_offloading_num_layers ({layout.cpu_offloading_num_layers}) excludes pipeline parallelism, but pp is "
            f"{layout.pp}: set cpu_offloading_num_layers to 0, or pp to 1"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-recompute",
        "megatron",
        "cpu_offloading_num_layers recompute_granularity",
        holds=lambda columns, workload, cluster: (
            _keeps_activations(columns) | columns.among("recompute_granularity", "none")
        ),
        message=lambda layout, workload, cluster: (
            f"cpu_offloading_num_layers ({layout.cpu_offloading_num_layers}) excludes recompute, but "
            f"recompute_granularity is {layout.recompute_granularity}: choose one of them"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-graphs",
        "megatron",
        OFFLOAD_AND_GRAPHS,
        holds=lambda columns, workload, cluster: _keeps_activations(columns) | ~_graphs(columns, whole=False),
        message=_explain_offload_and_graphs,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "offload-excludes-full-iteration-graph",
        "megatron",
        OFFLOAD_AND_GRAPHS,
        holds=lambda columns, workload, cluster: _keeps_activations(columns) | ~_graphs(columns, whole=True),
        message=_explain_offload_and_graphs,
        source=TRANSFORMER_CONFIG,
        gone_in="0.18",
    ),
    rule(
        "nccl-ub-needs-cuda",
        "program",
        "nccl_ub",
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or ~columns.on("nccl_ub"),
        message=lambda layout, workload, cluster: (
            "nccl_ub registers buffers with NCCL, but the cluster's device is cpu: turn it off"
        ),
        source="megatron/core/nccl_allocator.py",
    ),
    rule(
        "nccl-ub-excludes-expandable-segments",
        "megatron",
        "nccl_ub expandable_segments",
        holds=lambda columns, workload, cluster: not_all(
            columns.on("nccl_ub"), columns.on("expandable_segments")
        ),
        message=lambda layout, workload, cluster: (
            "nccl_ub takes its buffers from a memory pool, which does not work with expandable_segments: turn one off"
        ),
        source=DDP_CONFIG,
    ),
)
