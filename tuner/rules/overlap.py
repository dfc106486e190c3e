"""Communication overlap: which switches need each other, and which need CUDA."""

from collections.abc import Callable
from typing import Any

from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.rules.rule import Kind, Rule, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG

SCHEDULES = "megatron/core/pipeline_parallel/schedules.py, forward_backward_pipelining_without_interleaving"
ARGUMENTS = "megatron/training/arguments.py, validate_args"


def _needs_cuda(id: str, knob: str, what: str) -> Rule:
    return rule(
        id,
        "program",
        knob,
        holds=lambda c, w, k: k.device == "cuda" or ~c.on(knob),
        message=lambda x, w, k: (
            f"{knob} needs {what} on CUDA devices, but the cluster's device is {k.device}: turn it off"
        ),
        source=TRANSFORMER_CONFIG,
    )


def _expert_overlap(
    id: str,
    knobs: str,
    needs: Callable[[Columns, Workload, Cluster], Any],
    message: Callable[[Layout, Workload], str],
    kind: Kind = "megatron",
    source: str = TRANSFORMER_CONFIG,
    gone_in: str = "",
) -> Rule:
    """A need of overlap_moe_expert_parallel_comm."""
    return rule(
        id,
        kind,
        f"overlap_moe_expert_parallel_comm {knobs}",
        holds=lambda c, w, k: ~c.on("overlap_moe_expert_parallel_comm") | needs(c, w, k),
        message=lambda x, w, k: f"overlap_moe_expert_parallel_comm {message(x, w)}, or turn it off",
        source=source,
        gone_in=gone_in,
    )


RULES: tuple[Rule, ...] = (
    rule(
        "p2p-overlap-needs-interleaving",
        "megatron",
        "overlap_p2p_comm pp vpp",
        holds=lambda c, w, k: ~c.on("overlap_p2p_comm") | (c["pp"] == 1) | (c["vpp"] > 1),
        message=lambda x, w, k: (
            f"overlap_p2p_comm needs the interleaved schedule, but vpp is {x.vpp} (pp {x.pp}): turn it off "
            "or raise vpp"
        ),
        source=SCHEDULES,
    ),
    rule(
        "p2p-overlap-needs-pp",
        "canonical",
        "overlap_p2p_comm pp",
        holds=lambda c, w, k: ~c.on("overlap_p2p_comm") | (c["pp"] > 1),
        message=lambda x, w, k: f"overlap_p2p_comm is on, but pp is {x.pp}: nothing is sent; turn it off",
        source=SCHEDULES,
    ),
    rule(
        "interleaving-overlaps-p2p",
        "policy",
        "overlap_p2p_comm pp vpp",
        holds=lambda c, w, k: (c["vpp"] == 1) | (c["pp"] == 1) | c.on("overlap_p2p_comm"),
        message=lambda x, w, k: (
            f"vpp is {x.vpp} without overlap_p2p_comm: slower, and with pp 2 (it is {x.pp}) its batched "
            "sends can "
            "dead-lock; turn overlap_p2p_comm on, or lift this rule"
        ),
        source=(
            f"{ARGUMENTS} refuses it for pp 2, Megatron Bridge turns it on for vpp > 1, Megatron-Core takes "
            "it"
        ),
    ),
    rule(
        "param-gather-overlap-needs-both",
        "arguments",
        "overlap_param_gather overlap_grad_reduce use_distributed_optimizer",
        holds=lambda c, w, k: (
            ~c.on("overlap_param_gather") | (c.on("overlap_grad_reduce") & c.on("use_distributed_optimizer"))
        ),
        message=lambda x, w, k: (
            f"overlap_param_gather needs overlap_grad_reduce (it is {x.overlap_grad_reduce}) and "
            f"use_distributed_optimizer (it is {x.use_distributed_optimizer}): turn both on or it off"
        ),
        source=ARGUMENTS,
    ),
    rule(
        "interleaved-param-gather-needs-optimizer",
        "megatron",
        "overlap_param_gather use_distributed_optimizer vpp",
        holds=lambda c, w, k: (
            ~c.on("overlap_param_gather") | c.on("use_distributed_optimizer") | (c["vpp"] == 1)
        ),
        message=lambda x, w, k: (
            f"overlap_param_gather with vpp ({x.vpp}) > 1 needs use_distributed_optimizer: turn it on or the "
            "overlap off"
        ),
        source="megatron/core/distributed/param_and_grad_buffer.py, start_param_sync",
    ),
    rule(
        "tp-overlap-needs-sp",
        "arguments",
        "tp_comm_overlap sp",
        holds=lambda c, w, k: ~c.on("tp_comm_overlap") | c.on("sp"),
        message=lambda x, w, k: (
            f"tp_comm_overlap needs sequence parallelism, but sp is {x.sp} (tp {x.tp}): turn sp on or the "
            "overlap off"
        ),
        source=f"{ARGUMENTS}; Megatron Bridge turns it off silently",
    ),
    _needs_cuda("tp-overlap-needs-cuda", "tp_comm_overlap", "Transformer Engine's user buffers"),
    _expert_overlap(
        "expert-overlap-needs-ep",
        "ep",
        lambda c, w, k: c["ep"] > 1,
        lambda x, w: f"needs ep > 1, but it is {x.ep}: raise ep",
    ),
    _expert_overlap(
        "expert-overlap-needs-vpp",
        "pp vpp",
        lambda c, w, k: (c["pp"] == 1) | (c["vpp"] > 1),
        lambda x, w: f"needs vpp > 1 where pp > 1, but pp is {x.pp} and vpp {x.vpp}: raise vpp",
    ),
    _expert_overlap(
        "expert-overlap-needs-all-to-all",
        "moe_token_dispatcher_type",
        lambda c, w, k: c.among("moe_token_dispatcher_type", "alltoall", "flex"),
        lambda x, w: f"needs the alltoall or flex dispatcher, not {x.moe_token_dispatcher_type}: change it",
    ),
    _expert_overlap(
        "expert-overlap-needs-two-experts",
        "ep etp moe_token_dispatcher_type",
        # fp8 keeps its own copy, and several experts' tokens are sorted into one.
        lambda c, w, k: (
            (w.precision not in {"bf16", "fp16"})
            | (c["ep"] != (w.model.num_moe_experts or 0))
            | (c["etp"] > 1)
            | ~c.among("moe_token_dispatcher_type", "alltoall")
        ),
        lambda x, w: (
            f"frees the tokens of the alltoall dispatcher that one expert a rank (num_moe_experts / ep = "
            f"{w.model.num_moe_experts} / {x.ep}) still needs in its backward pass: lower ep"
        ),
        source="megatron/core/models/gpt/fine_grained_callables.py, should_free_input",
        gone_in="0.19",
    ),
    _expert_overlap(
        "expert-overlap-ends-with-experts",
        "",
        lambda c, w, k: not w.model.is_moe or bool(w.model.moe_layer_pattern()[-1]),
        lambda x, w: (
            f"leaves the final norm out after a dense layer, and layer {w.model.num_layers}, the last, has no experts"
        ),
        source="megatron/core/models/gpt/fine_grained_callables.py, submodule_combine_forward",
    ),
    _expert_overlap(
        "expert-overlap-excludes-full-recompute",
        "recompute_granularity recompute_method recompute_num_layers",
        lambda c, w, k: (
            ~c.among("recompute_granularity", "full")
            & c.among("recompute_method", "none")
            & (c["recompute_num_layers"] == 0)
        ),
        lambda x, w: (
            f"excludes full recompute (granularity {x.recompute_granularity}, method {x.recompute_method}, "
            f"{x.recompute_num_layers} layers): use none or selective"
        ),
    ),
    _expert_overlap(
        "expert-overlap-excludes-moe-recompute",
        "recompute_modules",
        lambda c, w, k: ~c.recomputes("moe"),
        lambda x, w: f"excludes recompute of moe, but recompute_modules is {x.recompute_modules}: drop moe",
        kind="arguments",
        source="Megatron Bridge, training/comm_overlap.py",
    ),
    _expert_overlap(
        "expert-overlap-excludes-shared-overlap",
        "moe_shared_expert_overlap",
        lambda c, w, k: ~c.on("moe_shared_expert_overlap"),
        lambda x, w: "excludes moe_shared_expert_overlap: turn that off",
    ),
    _expert_overlap(
        "expert-overlap-needs-half-precision",
        "",
        lambda c, w, k: w.precision != "fp32",
        lambda x, w: f"needs bf16 or fp16, not {w.precision}",
    ),
    _expert_overlap(
        "expert-overlap-and-mtp",
        "pp",
        lambda c, w, k: (w.model.mtp_num_layers is None) | ((w.model.mtp_num_layers == 1) & (c["pp"] > 1)),
        lambda x, w: (
            f"takes one layer of multi-token prediction (the model has {w.model.mtp_num_layers}) and then "
            "needs pp > 1 "
            f"(it is {x.pp})"
        ),
    ),
    rule(
        "delayed-wgrad-needs-expert-overlap",
        "megatron",
        "delay_wgrad_compute overlap_moe_expert_parallel_comm",
        holds=lambda c, w, k: ~c.on("delay_wgrad_compute") | c.on("overlap_moe_expert_parallel_comm"),
        message=lambda x, w, k: (
            "delay_wgrad_compute needs overlap_moe_expert_parallel_comm: turn that on or this off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    _needs_cuda("delayed-wgrad-needs-cuda", "delay_wgrad_compute", "Transformer Engine"),
)
