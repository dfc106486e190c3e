"""The layout: one value for each execution knob, Megatron's names of the knobs, and sizes that follow from a layout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from tuner.files import STRICT
from tuner.printable import OneLine

RecomputeGranularity = Literal["none", "selective", "full"]
RecomputeMethod = Literal["none", "uniform", "block"]
TokenDispatcher = Literal["allgather", "alltoall", "flex"]
FlexBackend = Literal["deepep", "hybridep"]
CpCommType = Literal["p2p", "all_gather", "a2a"]
CudaGraphImpl = Literal["none", "local", "transformer_engine"]
ShardingStrategy = Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]

Size = TypeVar("Size", int, NDArray[np.int64])

MOST = 32767
"""The largest value of a knob that has integer values. The table stores such a value in 16 bits, and no job comes near
this limit."""
DEFAULT_RECOMPUTE_MODULE = "core_attn"
"""The module that selective recomputation recomputes if `recompute_modules` is `none`. Published: Megatron-Core,
transformer_config.py, __post_init__."""


def _knob(default: object, megatron: str, flag: str, label: str = "") -> Any:
    """Return a dataclass field of Layout with its default and its metadata, which `Layout` describes."""
    return field(default=default, metadata={"megatron": megatron, "flag": flag, "label": label})


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One value for each execution knob.

    `0` and `"none"` stand for Megatron's None, so that the values of a knob have one type and fit into one column of a
    table. The metadata of a field has three entries: `megatron` (its name in Megatron Bridge's ConfigContainer;
    `env_vars.` names a variable of the job's environment), `flag` (its argument in Megatron-LM; empty for a variable)
    and `label` (its short form in `Layout.label`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tp: int = _knob(1, "model.tensor_model_parallel_size", "--tensor-model-parallel-size", "tp")
    pp: int = _knob(1, "model.pipeline_model_parallel_size", "--pipeline-model-parallel-size", "pp")
    vpp: int = _knob(
        1, "model.virtual_pipeline_model_parallel_size", "--num-virtual-stages-per-pipeline-rank", "vpp"
    )
    """Model chunks per pipeline rank; 1 is no interleaving."""
    cp: int = _knob(1, "model.context_parallel_size", "--context-parallel-size", "cp")
    ep: int = _knob(1, "model.expert_model_parallel_size", "--expert-model-parallel-size", "ep")
    etp: int = _knob(1, "model.expert_tensor_parallel_size", "--expert-tensor-parallel-size", "etp")
    """Number of ranks that split each expert. The value is always stated, since None means tp to Megatron-Core and 1 to
    Megatron Bridge."""
    sp: bool = _knob(False, "model.sequence_parallel", "--sequence-parallel", "sp")
    micro_batch_size: int = _knob(1, "train.micro_batch_size", "--micro-batch-size", "mbs")
    """Samples per micro-batch of one data-parallel replica."""

    num_layers_in_first_pipeline_stage: int = _knob(
        0, "model.num_layers_in_first_pipeline_stage", "--decoder-first-pipeline-num-layers", "first"
    )
    num_layers_in_last_pipeline_stage: int = _knob(
        0, "model.num_layers_in_last_pipeline_stage", "--decoder-last-pipeline-num-layers", "last"
    )
    account_for_embedding_in_pipeline_split: bool = _knob(
        False,
        "model.account_for_embedding_in_pipeline_split",
        "--account-for-embedding-in-pipeline-split",
        "emb",
    )
    account_for_loss_in_pipeline_split: bool = _knob(
        False, "model.account_for_loss_in_pipeline_split", "--account-for-loss-in-pipeline-split", "loss"
    )
    microbatch_group_size_per_vp_stage: int = _knob(
        0,
        "model.microbatch_group_size_per_vp_stage",
        "--microbatch-group-size-per-virtual-pipeline-stage",
        "group",
    )
    """Micro-batches that one model chunk of a rank processes before the rank turns to its next chunk; 0 is Megatron's
    default, pp."""
    pipeline_model_parallel_layout: OneLine = _knob(
        "none", "model.pipeline_model_parallel_layout", "--pipeline-model-parallel-layout", "stages"
    )
    """The layers in each of the pp * vpp chunks, in Megatron's letters (`Et*3|(t*4|)*14tmL`); with `none`, the knobs
    above divide the layers among the chunks."""
    cp_comm_type: CpCommType = _knob("p2p", "model.cp_comm_type", "--cp-comm-type", "cpc")

    recompute_granularity: RecomputeGranularity = _knob(
        "none", "model.recompute_granularity", "--recompute-granularity", "rc"
    )
    recompute_method: RecomputeMethod = _knob("none", "model.recompute_method", "--recompute-method", "")
    recompute_num_layers: int = _knob(0, "model.recompute_num_layers", "--recompute-num-layers", "")
    recompute_modules: OneLine = _knob("none", "model.recompute_modules", "--recompute-modules", "")
    """The modules that selective recomputation recomputes, joined by `+` (`core_attn+layernorm`); `none` is Megatron's
    default, `DEFAULT_RECOMPUTE_MODULE`."""

    use_distributed_optimizer: bool = _knob(
        True, "ddp.use_distributed_optimizer", "--use-distributed-optimizer", "zero1"
    )
    overlap_grad_reduce: bool = _knob(False, "ddp.overlap_grad_reduce", "--overlap-grad-reduce", "ogr")
    overlap_param_gather: bool = _knob(False, "ddp.overlap_param_gather", "--overlap-param-gather", "opg")
    overlap_p2p_comm: bool = _knob(
        False, "comm_overlap.overlap_p2p_comm", "--no-overlap-p2p-communication", "op2p"
    )
    """Whether the pipeline's sends and receives overlap compute, which needs an interleaved schedule. Megatron-LM's
    flag turns the overlap off."""
    tp_comm_overlap: bool = _knob(False, "comm_overlap.tp_comm_overlap", "--tp-comm-overlap", "otp")

    moe_token_dispatcher_type: TokenDispatcher = _knob(
        "alltoall", "model.moe_token_dispatcher_type", "--moe-token-dispatcher-type", "disp"
    )
    moe_flex_dispatcher_backend: FlexBackend = _knob(
        "deepep", "model.moe_flex_dispatcher_backend", "--moe-flex-dispatcher-backend", "flex"
    )
    """The library that dispatches tokens if `moe_token_dispatcher_type` is flex."""
    moe_shared_expert_overlap: bool = _knob(
        False, "model.moe_shared_expert_overlap", "--moe-shared-expert-overlap", "ose"
    )
    overlap_moe_expert_parallel_comm: bool = _knob(
        False, "comm_overlap.overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm", "oep"
    )
    delay_wgrad_compute: bool = _knob(
        False, "comm_overlap.delay_wgrad_compute", "--delay-wgrad-compute", "dwgrad"
    )

    cuda_graph_impl: CudaGraphImpl = _knob("none", "model.cuda_graph_impl", "--cuda-graph-impl", "graph")
    cuda_graph_scope: OneLine = _knob("none", "model.cuda_graph_modules", "--cuda-graph-modules", "scope")
    """The parts of a layer that a CUDA graph captures, joined by `+` (`attn+moe_router`), or `full_iteration`; `none`
    is the whole layer. Megatron-Core 0.16 calls the field cuda_graph_scope."""
    use_megatron_fsdp: bool = _knob(False, "ddp.use_megatron_fsdp", "--use-megatron-fsdp", "fsdp")
    data_parallel_sharding_strategy: ShardingStrategy = _knob(
        "no_shard", "ddp.data_parallel_sharding_strategy", "--data-parallel-sharding-strategy", "shard"
    )
    """The parts of the model's state that Megatron-FSDP shards over the data-parallel ranks; without Megatron-FSDP the
    knob has no meaning."""
    cpu_offloading_num_layers: int = _knob(
        0, "model.cpu_offloading_num_layers", "--cpu-offloading-num-layers", "offload"
    )
    """Number of layers whose activations are offloaded to host memory; 0 is no offloading."""
    nccl_ub: bool = _knob(False, "ddp.nccl_ub", "--use-nccl-ub", "ncclub")
    """Whether gradients and weights are stored in buffers that are registered with NCCL."""

    cuda_device_max_connections: int = _knob(0, "env_vars.CUDA_DEVICE_MAX_CONNECTIONS", "", "queues")
    """Number of hardware queues that a process uses; with 0, `cuda_environment` (tuner/core/environment.py) chooses it
    from the other knobs and the GPU."""
    expandable_segments: bool = _knob(False, "env_vars.PYTORCH_CUDA_ALLOC_CONF", "", "segments")
    """Whether PyTorch's allocator grows its segments in place, which reduces fragmentation."""
    nccl_nvls_enable: bool = _knob(True, "env_vars.NCCL_NVLS_ENABLE", "", "nvls")
    """Whether NCCL reduces inside NVLink's switches if the hardware can do so; this takes memory."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "microbatch_group_size_per_vp_stage",
            "recompute_num_layers",
            "cpu_offloading_num_layers",
            "cuda_device_max_connections",
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be at least 0 (0 leaves it to Megatron), not {getattr(self, name)}"
                )
        for name in KNOBS:
            value = getattr(self, name)
            if isinstance(value, int) and value > MOST:
                raise ValueError(f"{name} must be at most {MOST}, not {value}")

    def label(self) -> str:
        """Return a short name such as `tp2 pp4 sp mbs2 rc=selective`.

        It lists tp, pp, the micro-batch size, and every other knob that differs from its default.
        """
        parts = []
        for knob in fields(self):
            value, label = getattr(self, knob.name), knob.metadata["label"]
            if not label or (value == knob.default and label not in {"tp", "pp", "mbs"}):
                continue
            if value is True:
                parts.append(label)
            elif value is False:
                parts.append(f"no-{label}")
            else:
                parts.append(f"{label}={value}" if isinstance(value, str) else f"{label}{value}")
        if self.recompute_granularity == "full":
            parts[parts.index("rc=full")] = f"rc=full:{self.recompute_method}:{self.recompute_num_layers}"
        elif self.recompute_granularity == "selective" and self.recompute_modules != "none":
            parts[parts.index("rc=selective")] = f"rc={self.recompute_modules}"
        return " ".join(parts)


KNOBS: tuple[str, ...] = tuple(knob.name for knob in fields(Layout))
"""The names of all knobs, in the order of the table's columns."""

MOE_KNOBS: tuple[str, ...] = (
    "ep",
    "etp",
    "moe_token_dispatcher_type",
    "moe_flex_dispatcher_backend",
    "moe_shared_expert_overlap",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
)
"""The knobs that have no meaning for a dense model."""

ENVIRONMENT_KNOBS: tuple[str, ...] = tuple(
    knob.name for knob in fields(Layout) if knob.metadata["megatron"].startswith("env_vars.")
)
"""The knobs that are variables of the job's environment and not fields of Megatron."""

DEFAULTS: Mapping[str, Any] = {knob.name: knob.default for knob in fields(Layout)}
"""The default of every knob."""


def layout_from(row: Mapping[str, Any]) -> Layout:
    """Return the layout that `row` describes: one row of a table, or any mapping from knobs to values.

    NumPy scalars become plain Python values. A knob that is missing takes its default, and other keys are ignored.
    """
    values = {name: row[name] for name in KNOBS if name in row}
    return Layout(
        **{name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    )


def data_parallel_size(world_size: int, tp: Size, pp: Size, cp: Size) -> Size:
    """Return dp = world_size / (tp*pp*cp): the number of replicas of the model that process different samples."""
    return world_size // (tp * pp * cp)


def expert_data_parallel_size(world_size: int, pp: Size, ep: Size, etp: Size) -> Size:
    """Return edp = world_size / (pp*ep*etp): the number of replicas of each expert."""
    return world_size // (pp * ep * etp)


def min_gpus(tp: Size, pp: Size, cp: Size, ep: Size, etp: Size) -> Size:
    """Return the smallest number of GPUs on which these parallel sizes fit: pp * max(tp*cp, ep*etp).

    Dense layers and experts share the GPUs of a stage (arXiv:2504.14960).
    """
    stage: Size = np.maximum(tp * cp, ep * etp)
    return pp * stage


def num_microbatches(global_batch_size: int, micro_batch_size: Size, dp: Size) -> Size:
    """Return global_batch_size / (micro_batch_size*dp): the micro-batches per replica in one optimizer step."""
    return global_batch_size // (micro_batch_size * dp)


def module_names(modules: str) -> Iterable[str]:
    """Return the names in `modules`, a value of `recompute_modules` or `cuda_graph_scope`; `none` has no names."""
    return () if modules == "none" else tuple(modules.split("+"))


def recomputed_modules(modules: str) -> Iterable[str]:
    """Return the modules that selective recomputation recomputes if `recompute_modules` has the value `modules`.

    For the value `none` this is Megatron's default module.
    """
    return module_names(modules) or (DEFAULT_RECOMPUTE_MODULE,)
