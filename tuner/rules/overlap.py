"""Rules for the overlap of communication with compute: which switches need one another, and which need CUDA devices."""

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.workload import Workload
from tuner.rules.rule import Explanation, Kind, Predicate, Rule, implies, not_all, rule
from tuner.rules.sources import TRANSFORMER_CONFIG, VALIDATE_ARGS

PLAIN_SCHEDULE = (
    "megatron/core/pipeline_parallel/schedules.py, forward_backward_pipelining_without_interleaving"
)
EXPERT_CALLABLES = "megatron/core/models/gpt/fine_grained_callables.py"


def _needs_cuda(id: str, knob: str, requirement: str) -> Rule:
    """Return the rule with this `id`: the switch `knob` must be off on CPU ranks.

    `requirement` says, for the message, what the switch needs on CUDA devices.
    """
    return rule(
        id,
        "program",
        knob,
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or ~columns.on(knob),
        message=lambda layout, workload, cluster: (
            f"{knob} needs {requirement} on CUDA devices, but the cluster's device is {cluster.device}: turn it off"
        ),
        source=TRANSFORMER_CONFIG,
    )


def _expert_overlap(
    id: str,
    knobs: str,
    *,
    needs: Predicate,
    message: Explanation,
    kind: Kind = "megatron",
    source: str = TRANSFORMER_CONFIG,
    since: str = "",
    gone_in: str = "",
) -> Rule:
    """Return the rule that a layout with overlap_moe_expert_parallel_comm on must satisfy `needs`.

    `knobs` names the other knobs that `needs` reads, separated by spaces. `message` returns the rest of a sentence
    whose subject is overlap_moe_expert_parallel_comm.
    """
    return rule(
        id,
        kind,
        f"overlap_moe_expert_parallel_comm {knobs}",
        holds=lambda columns, workload, cluster: implies(
            columns.on("overlap_moe_expert_parallel_comm"), needs(columns, workload, cluster)
        ),
        message=lambda layout, workload, cluster: (
            f"overlap_moe_expert_parallel_comm {message(layout, workload, cluster)}, or turn it off"
        ),
        source=source,
        since=since,
        gone_in=gone_in,
    )


def _p2p_overlap_interleaves(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(columns.on("overlap_p2p_comm") & (columns["pp"] > 1), columns["vpp"] > 1)


def _interleaving_overlaps_p2p(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies((columns["vpp"] > 1) & (columns["pp"] > 1), columns.on("overlap_p2p_comm"))


def _param_gather_overlap_has_both(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    both = columns.on("overlap_grad_reduce") & columns.on("use_distributed_optimizer")
    return implies(columns.on("overlap_param_gather"), both)


def _token_inputs_are_not_freed(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    """Return a mask of the rows where the overlap of expert communication frees no tokens that the backward pass needs.

    It frees the tokens that the alltoall dispatcher passes to a rank's only expert. With several experts on a rank, the
    tokens are copied when they are sorted by expert; and with fp8 there is an fp8 copy.
    """
    if workload.precision not in {"bf16", "fp16"}:
        return True
    one_whole_expert = (columns["ep"] == (workload.model.num_moe_experts or 0)) & (columns["etp"] == 1)
    frees: Bools = one_whole_expert & columns.among("moe_token_dispatcher_type", "alltoall")
    return ~frees


def _last_layer_has_experts(columns: Columns, workload: Workload, cluster: Cluster) -> bool:
    return not workload.model.is_moe or bool(workload.model.moe_layer_pattern()[-1])


def _no_full_recompute(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    not_full = ~columns.among("recompute_granularity", "full")
    no_method = columns.among("recompute_method", "none")
    no_layers: Bools = columns["recompute_num_layers"] == 0
    return not_full & no_method & no_layers


def _fsdp_has_no_layer_graphs(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    layer_graphs = ~columns.among("cuda_graph_impl", "none") & ~columns.graphs("full_iteration")
    return not_all(columns.on("use_megatron_fsdp"), layer_graphs)


def _mtp_has_pp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    return workload.model.mtp_num_layers is None or columns["pp"] > 1


RULES: tuple[Rule, ...] = (
    rule(
        "p2p-overlap-needs-interleaving",
        "megatron",
        "overlap_p2p_comm pp vpp",
        holds=_p2p_overlap_interleaves,
        message=lambda layout, workload, cluster: (
            f"overlap_p2p_comm needs the interleaved schedule, but vpp is {layout.vpp} (pp {layout.pp}): turn it off "
            "or raise vpp"
        ),
        source=PLAIN_SCHEDULE,
    ),
    rule(
        "p2p-overlap-needs-pp",
        "canonical",
        "overlap_p2p_comm pp",
        holds=lambda columns, workload, cluster: implies(columns.on("overlap_p2p_comm"), columns["pp"] > 1),
        message=lambda layout, workload, cluster: (
            f"overlap_p2p_comm is on, but pp is {layout.pp}: nothing is sent; turn it off"
        ),
        source=PLAIN_SCHEDULE,
    ),
    rule(
        "interleaving-overlaps-p2p",
        "policy",
        "overlap_p2p_comm pp vpp",
        holds=_interleaving_overlaps_p2p,
        message=lambda layout, workload, cluster: (
            f"vpp is {layout.vpp} without overlap_p2p_comm: slower, and with pp 2 (it is {layout.pp}) its batched "
            "sends can dead-lock; turn overlap_p2p_comm on, or lift this rule"
        ),
        source=(
            f"{VALIDATE_ARGS} refuses it for pp 2, Megatron Bridge turns it on for vpp > 1, Megatron-Core takes it"
        ),
    ),
    rule(
        "param-gather-overlap-needs-both",
        "arguments",
        "overlap_param_gather overlap_grad_reduce use_distributed_optimizer",
        holds=_param_gather_overlap_has_both,
        message=lambda layout, workload, cluster: (
            f"overlap_param_gather needs overlap_grad_reduce (it is {layout.overlap_grad_reduce}) and "
            f"use_distributed_optimizer (it is {layout.use_distributed_optimizer}): turn these two on, or it off"
        ),
        source=f"{VALIDATE_ARGS}; with several replicas also core/distributed/param_and_grad_buffer.py, since 0.17",
    ),
    rule(
        "tp-overlap-needs-sp",
        "arguments",
        "tp_comm_overlap sp",
        holds=lambda columns, workload, cluster: implies(columns.on("tp_comm_overlap"), columns.on("sp")),
        message=lambda layout, workload, cluster: (
            f"tp_comm_overlap needs sequence parallelism, but sp is {layout.sp} (tp {layout.tp}): turn sp on or the "
            "overlap off"
        ),
        source=f"{VALIDATE_ARGS}; Megatron Bridge turns it off silently",
    ),
    _needs_cuda("tp-overlap-needs-cuda", "tp_comm_overlap", "Transformer Engine's user buffers"),
    _expert_overlap(
        "expert-overlap-needs-ep",
        "ep",
        needs=lambda columns, workload, cluster: columns["ep"] > 1,
        message=lambda layout, workload, cluster: f"needs ep > 1, but it is {layout.ep}: raise ep",
    ),
    _expert_overlap(
        "expert-overlap-needs-vpp",
        "pp vpp",
        needs=lambda columns, workload, cluster: (columns["pp"] == 1) | (columns["vpp"] > 1),
        message=lambda layout, workload, cluster: (
            f"needs vpp > 1 where pp > 1, but pp is {layout.pp} and vpp {layout.vpp}: raise vpp"
        ),
    ),
    _expert_overlap(
        "expert-overlap-needs-all-to-all",
        "moe_token_dispatcher_type",
        needs=lambda columns, workload, cluster: columns.among(
            "moe_token_dispatcher_type", "alltoall", "flex"
        ),
        message=lambda layout, workload, cluster: (
            f"needs the alltoall or flex dispatcher, not {layout.moe_token_dispatcher_type}: change it"
        ),
    ),
    _expert_overlap(
        "expert-overlap-needs-two-experts",
        "ep etp moe_token_dispatcher_type",
        needs=_token_inputs_are_not_freed,
        message=lambda layout, workload, cluster: (
            "frees the tokens of the alltoall dispatcher that a rank's only expert (num_moe_experts / ep = "
            f"{workload.model.num_moe_experts} / {layout.ep}) still needs in its backward pass: lower ep"
        ),
        source=f"{EXPERT_CALLABLES}, should_free_input",
        gone_in="0.19",
    ),
    _expert_overlap(
        "expert-overlap-ends-with-experts",
        "",
        needs=_last_layer_has_experts,
        message=lambda layout, workload, cluster: (
            f"leaves the final norm out after a dense layer, and layer {workload.model.num_layers}, the last, has no "
            "experts"
        ),
        source=f"{EXPERT_CALLABLES}, submodule_combine_forward",
    ),
    _expert_overlap(
        "expert-overlap-excludes-full-recompute",
        "recompute_granularity recompute_method recompute_num_layers",
        needs=_no_full_recompute,
        message=lambda layout, workload, cluster: (
            f"excludes full recompute (granularity {layout.recompute_granularity}, method {layout.recompute_method}, "
            f"{layout.recompute_num_layers} layers): use none or selective"
        ),
    ),
    _expert_overlap(
        "expert-overlap-excludes-moe-recompute",
        "recompute_modules",
        needs=lambda columns, workload, cluster: ~columns.recomputes("moe"),
        message=lambda layout, workload, cluster: (
            f"excludes recompute of moe, but recompute_modules is {layout.recompute_modules}: drop moe"
        ),
        kind="arguments",
        source=f"Megatron Bridge, training/comm_overlap.py; since 0.17 also {TRANSFORMER_CONFIG}",
    ),
    _expert_overlap(
        "expert-overlap-excludes-shared-overlap",
        "moe_shared_expert_overlap",
        needs=lambda columns, workload, cluster: ~columns.on("moe_shared_expert_overlap"),
        message=lambda layout, workload, cluster: "excludes moe_shared_expert_overlap: turn that off",
    ),
    _expert_overlap(
        "expert-overlap-with-fsdp-excludes-layer-graphs",
        "use_megatron_fsdp cuda_graph_impl cuda_graph_scope",
        needs=_fsdp_has_no_layer_graphs,
        message=lambda layout, workload, cluster: (
            f"with use_megatron_fsdp excludes CUDA graphs of layers, but cuda_graph_impl is {layout.cuda_graph_impl} "
            f"and cuda_graph_scope {layout.cuda_graph_scope}: turn them off, or capture the full iteration"
        ),
        source="megatron/core/distributed/fsdp/mcore_fsdp_adapter.py",
        since="0.18",
    ),
    _expert_overlap(
        "expert-overlap-needs-half-precision",
        "",
        needs=lambda columns, workload, cluster: workload.precision != "fp32",
        message=lambda layout, workload, cluster: f"needs bf16 or fp16, not {workload.precision}",
    ),
    _expert_overlap(
        "expert-overlap-needs-one-mtp-layer",
        "",
        needs=lambda columns, workload, cluster: (workload.model.mtp_num_layers or 0) <= 1,
        message=lambda layout, workload, cluster: (
            "supports at most one layer of multi-token prediction, and the model has "
            f"{workload.model.mtp_num_layers}: turn it off"
        ),
    ),
    _expert_overlap(
        "expert-overlap-of-mtp-needs-pp",
        "pp",
        needs=_mtp_has_pp,
        message=lambda layout, workload, cluster: (
            f"needs pp > 1 with multi-token prediction, and pp is {layout.pp}: turn it off or raise pp"
        ),
        gone_in="0.18",
    ),
    rule(
        "delayed-wgrad-needs-expert-overlap",
        "megatron",
        "delay_wgrad_compute overlap_moe_expert_parallel_comm",
        holds=lambda columns, workload, cluster: implies(
            columns.on("delay_wgrad_compute"), columns.on("overlap_moe_expert_parallel_comm")
        ),
        message=lambda layout, workload, cluster: (
            "delay_wgrad_compute needs overlap_moe_expert_parallel_comm: turn that on or this off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    _needs_cuda("delayed-wgrad-needs-cuda", "delay_wgrad_compute", "Transformer Engine"),
)
