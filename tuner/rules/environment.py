"""Rules for the environment variables of a job, and for features that only some kinds of GPU can run."""

import re

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.environment import BLACKWELL_OR_LATER
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, Layout
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, implies, rule
from tuner.rules.sources import VALIDATE_ARGS

FLEX_BACKEND = "Megatron Bridge, training/flex_dispatcher_backend.py, validate_flex_dispatcher_backend"
CONNECTIONS = "cuda_device_max_connections"
MOST_CONNECTIONS = 32
"""The largest CUDA_DEVICE_MAX_CONNECTIONS that CUDA accepts. Published: CUDA C++ Programming Guide, CUDA environment
variables."""

_BEFORE_AMPERE = re.compile(r"\b(P|V|T)\d{1,3}\b", re.IGNORECASE)
"""Matches the name of a GPU older than Ampere: P100, V100, T4."""
_GRACE_BLACKWELL = re.compile(r"\bGB\d{3}\b", re.IGNORECASE)
"""Matches the name of a GPU of a Grace Blackwell node: GB200, GB300."""


def flex_backend_runs(backend: str, cluster: Cluster) -> bool:
    """Return whether a backend of the flex dispatcher runs on the cluster's GPUs; True if their kind is unknown."""
    if _BEFORE_AMPERE.search(cluster.gpu.name):
        return False
    return backend != "deepep" or not _GRACE_BLACKWELL.search(cluster.gpu.name)


def _variables_are_default(columns: Columns) -> Bools:
    default: Bools = columns[CONNECTIONS] == DEFAULTS[CONNECTIONS]
    for knob in ENVIRONMENT_KNOBS:
        if knob != CONNECTIONS:
            default &= columns.on(knob) == DEFAULTS[knob]
    return default


def _backend_is_read(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    uses_flex = columns.among("moe_token_dispatcher_type", "flex")
    return uses_flex | columns.among("moe_flex_dispatcher_backend", "deepep")


def _backend_runs_on_gpu(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    runs = columns.text("moe_flex_dispatcher_backend", lambda backend: flex_backend_runs(backend, cluster))
    return implies(columns.among("moe_token_dispatcher_type", "flex"), runs)


def _overlap_has_one_connection(columns: Columns, workload: Workload, cluster: Cluster) -> Bools | bool:
    """Return a mask of the rows where communication of tp and cp can overlap with compute.

    A GPU older than Blackwell starts communication ahead of the compute that hides it only if both share one hardware
    queue, that is, if CUDA_DEVICE_MAX_CONNECTIONS is 1.
    """
    if BLACKWELL_OR_LATER.search(cluster.gpu.name):
        return True
    exempt = columns.on("use_megatron_fsdp") | columns.on("overlap_moe_expert_parallel_comm")
    single_rank = columns["tp"] * columns["cp"] == 1
    holds: Bools = (columns[CONNECTIONS] <= 1) | single_rank | exempt
    return holds


def _fsdp_has_connections(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return implies(columns.on("use_megatron_fsdp"), columns[CONNECTIONS] != 1)


def _changed_variables(layout: Layout) -> str:
    changed = [knob for knob in ENVIRONMENT_KNOBS if getattr(layout, knob) != DEFAULTS[knob]]
    return ", ".join(f"{knob} ({getattr(layout, knob)})" for knob in changed)


RULES: tuple[Rule, ...] = (
    rule(
        "flex-backend-needs-flex",
        "canonical",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=_backend_is_read,
        message=lambda layout, workload, cluster: (
            f"moe_flex_dispatcher_backend is {layout.moe_flex_dispatcher_backend}, but the dispatcher is "
            f"{layout.moe_token_dispatcher_type}: leave it at deepep, or use flex"
        ),
        source="megatron/core/transformer/moe/token_dispatcher.py",
    ),
    rule(
        "flex-backend-runs-on-gpu",
        "program",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=_backend_runs_on_gpu,
        message=lambda layout, workload, cluster: (
            f"{layout.moe_flex_dispatcher_backend} does not run on {cluster.gpu.name}: DeepEP runs on Ampere, "
            "Hopper, B200 and B300, HybridEP on these and on GB200 and GB300; choose the other backend, or alltoall"
        ),
        source=FLEX_BACKEND,
    ),
    rule(
        "variables-need-cuda",
        "canonical",
        " ".join(ENVIRONMENT_KNOBS),
        holds=lambda columns, workload, cluster: cluster.device == "cuda" or _variables_are_default(columns),
        message=lambda layout, workload, cluster: (
            f"{_changed_variables(layout)}: the variables of CUDA and NCCL have no effect on a cluster of device "
            f"{cluster.device}; leave them at their defaults"
        ),
        source="the variables' own documentation",
    ),
    rule(
        "connections-in-range",
        "program",
        CONNECTIONS,
        holds=lambda columns, workload, cluster: columns[CONNECTIONS] <= MOST_CONNECTIONS,
        message=lambda layout, workload, cluster: (
            f"cuda_device_max_connections is {layout.cuda_device_max_connections}: CUDA takes 1 to {MOST_CONNECTIONS} "
            "(0 leaves it to the other knobs)"
        ),
        source="CUDA C++ Programming Guide, CUDA environment variables",
    ),
    rule(
        "tp-and-cp-want-one-connection",
        "arguments",
        f"{CONNECTIONS} tp cp use_megatron_fsdp overlap_moe_expert_parallel_comm",
        holds=_overlap_has_one_connection,
        message=lambda layout, workload, cluster: (
            f"cuda_device_max_connections is {layout.cuda_device_max_connections}, but tp*cp = {layout.tp}*{layout.cp} "
            f"on {cluster.gpu.name} needs 1 (before Blackwell, without Megatron-FSDP or expert overlap): set it to 0 "
            "or 1"
        ),
        source=VALIDATE_ARGS,
    ),
    rule(
        "fsdp-wants-connections",
        "arguments",
        f"{CONNECTIONS} use_megatron_fsdp",
        holds=_fsdp_has_connections,
        message=lambda layout, workload, cluster: (
            f"use_megatron_fsdp refuses cuda_device_max_connections {layout.cuda_device_max_connections}: set it to 0 "
            "or above 1"
        ),
        source=f"{VALIDATE_ARGS}; Megatron Bridge, training/config.py",
    ),
)
