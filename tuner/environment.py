"""The environment variables of CUDA that a layout asks for."""

import re

from tuner.layout import Layout

_BLACKWELL = re.compile(r"\b(GB|B)\d{3}\b", re.IGNORECASE)


def cuda_environment(layout: Layout, gpu_name: str) -> dict[str, str]:
    """Return what a CUDA job of this layout sets.

    Up to Hopper, communication that overlaps tp or cp must be queued before the compute it overlaps with, as
    only a single hardware queue promises; expert dispatch that overlaps compute, and Blackwell, want many.
    Source: Megatron Bridge, scripts/performance/utils/overrides.py (32 with DeepEP, 1 with tp or cp, else 8);
    Megatron-LM's arguments.py asserts the 1.
    """
    if _BLACKWELL.search(gpu_name) or layout.moe_token_dispatcher_type == "flex":  # noqa: S105
        connections = 32
    elif (layout.tp > 1 or layout.cp > 1) and not layout.overlap_moe_expert_parallel_comm:
        connections = 1
    else:
        connections = 8
    return {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
