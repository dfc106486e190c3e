"""What the job's environment and the kind of GPU allow."""

import re

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.environment import BLACKWELL_OR_LATER
from tuner.core.layout import DEFAULTS, ENVIRONMENT_KNOBS, Layout
from tuner.rules.rule import Rule, rule

ARGUMENTS = "megatron/training/arguments.py, validate_args"
FLEX_BACKEND = "Megatron Bridge, training/flex_dispatcher_backend.py, validate_flex_dispatcher_backend"
CONNECTIONS = "cuda_device_max_connections"
MOST_CONNECTIONS = 32

_BEFORE_AMPERE = re.compile(r"\b(P|V|T)\d{1,3}\b", re.IGNORECASE)
_GRACE_BLACKWELL = re.compile(r"\bGB\d{3}\b", re.IGNORECASE)


def _unset(c: Columns) -> Bools:
    """Where no variable of the environment differs from its default."""
    unset: Bools = c[CONNECTIONS] == DEFAULTS[CONNECTIONS]
    for knob in ENVIRONMENT_KNOBS:
        if knob != CONNECTIONS:
            unset &= c.on(knob) == DEFAULTS[knob]
    return unset


def _one_queue(c: Columns) -> Bools:
    """Before Blackwell only a single queue starts communication before the compute it overlaps with."""
    free = c.on("use_megatron_fsdp") | c.on("overlap_moe_expert_parallel_comm")
    holds: Bools = (c[CONNECTIONS] <= 1) | (c["tp"] * c["cp"] == 1) | free
    return holds


def flex_backend_runs(backend: str, k: Cluster) -> bool:
    """Whether a dispatcher's backend runs on the cluster's GPUs; those it does not know pass."""
    if _BEFORE_AMPERE.search(k.gpu.name):
        return False
    return backend != "deepep" or not _GRACE_BLACKWELL.search(k.gpu.name)


def _set_variables(x: Layout) -> str:
    changed = [knob for knob in ENVIRONMENT_KNOBS if getattr(x, knob) != DEFAULTS[knob]]
    return ", ".join(f"{knob} ({getattr(x, knob)})" for knob in changed)


RULES: tuple[Rule, ...] = (
    rule(
        "flex-backend-needs-flex",
        "canonical",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=lambda c, w, k: (
            c.among("moe_token_dispatcher_type", "flex") | c.among("moe_flex_dispatcher_backend", "deepep")
        ),
        message=lambda x, w, k: (
            f"moe_flex_dispatcher_backend is {x.moe_flex_dispatcher_backend}, but the dispatcher is "
            f"{x.moe_token_dispatcher_type}: leave it at deepep, or use flex"
        ),
        source="megatron/core/transformer/moe/token_dispatcher.py",
    ),
    rule(
        "flex-backend-runs-on-gpu",
        "program",
        "moe_token_dispatcher_type moe_flex_dispatcher_backend",
        holds=lambda c, w, k: (
            ~c.among("moe_token_dispatcher_type", "flex")
            | c.text("moe_flex_dispatcher_backend", lambda backend: flex_backend_runs(backend, k))
        ),
        message=lambda x, w, k: (
            f"{x.moe_flex_dispatcher_backend} does not run on {k.gpu.name}: DeepEP takes Ampere, Hopper, B200 and "
            "B300, HybridEP GB200 and GB300 as well; choose the other, or alltoall"
        ),
        source=FLEX_BACKEND,
    ),
    rule(
        "variables-need-cuda",
        "canonical",
        " ".join(ENVIRONMENT_KNOBS),
        holds=lambda c, w, k: k.device == "cuda" or _unset(c),
        message=lambda x, w, k: (
            f"{_set_variables(x)}: CUDA's and NCCL's variables say nothing to a cluster of device {k.device}; leave "
            "them at their defaults"
        ),
        source="the variables' own documentation",
    ),
    rule(
        "connections-in-range",
        "program",
        CONNECTIONS,
        holds=lambda c, w, k: c[CONNECTIONS] <= MOST_CONNECTIONS,
        message=lambda x, w, k: (
            f"cuda_device_max_connections is {x.cuda_device_max_connections}: CUDA takes 1 to {MOST_CONNECTIONS} "
            "(0 leaves it to the other knobs)"
        ),
        source="CUDA C++ Programming Guide, CUDA environment variables",
    ),
    rule(
        "tp-and-cp-want-one-connection",
        "arguments",
        f"{CONNECTIONS} tp cp use_megatron_fsdp overlap_moe_expert_parallel_comm",
        holds=lambda c, w, k: bool(BLACKWELL_OR_LATER.search(k.gpu.name)) or _one_queue(c),
        message=lambda x, w, k: (
            f"cuda_device_max_connections is {x.cuda_device_max_connections}, but tp*cp = {x.tp}*{x.cp} on "
            f"{k.gpu.name} needs 1 (before Blackwell, without Megatron-FSDP or expert overlap): set it to 0 or 1"
        ),
        source=ARGUMENTS,
    ),
    rule(
        "fsdp-wants-connections",
        "arguments",
        f"{CONNECTIONS} use_megatron_fsdp",
        holds=lambda c, w, k: ~c.on("use_megatron_fsdp") | (c[CONNECTIONS] != 1),
        message=lambda x, w, k: (
            f"use_megatron_fsdp refuses cuda_device_max_connections {x.cuda_device_max_connections}: set it to 0 or "
            "above 1"
        ),
        source=f"{ARGUMENTS}; Megatron Bridge, training/config.py",
    ),
)
