"""Environment variables: those of CUDA that a layout asks for, and those that a trial's record keeps."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from urllib.parse import urlsplit

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout

BLACKWELL_OR_LATER = re.compile(r"\b(GB|B|VR|R)\d{3}\b", re.IGNORECASE)


def cuda_environment(layout: Layout, cluster: Cluster, complete: bool = False) -> dict[str, str]:
    """Return what a CUDA job of this layout sets.

    HybridEP, one of the flex dispatchers, asks how many ranks of an expert group share an NVLink domain. NCCL must not
    register what CUDA graphs reach in segments that grow. Source: Megatron-LM's arguments.py; Megatron Bridge's
    scripts/performance/utils/overrides.py, and the `env_vars` of its perf_recipes.

    Args:
        layout: The layout.
        cluster: The GPUs.
        complete: State also those variables whose knob has its default, since a recipe may set them otherwise.
    """
    variables = {
        "CUDA_DEVICE_MAX_CONNECTIONS": str(layout.cuda_device_max_connections or _queues(layout, cluster))
    }
    if layout.moe_token_dispatcher_type == "flex" and layout.moe_flex_dispatcher_backend == "hybridep":  # noqa: S105
        ranks = min(layout.ep, cluster.nvlink_domain_gpus)
        variables["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = str(ranks)
    if layout.expandable_segments or complete:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{layout.expandable_segments}"
    if layout.expandable_segments and layout.cuda_graph_impl != "none":
        variables["NCCL_GRAPH_REGISTER"] = "0"
    if not layout.nccl_nvls_enable or complete:
        variables["NCCL_NVLS_ENABLE"] = NVLS_WHERE_THERE_IS_ANY if layout.nccl_nvls_enable else "0"
    return variables


NVLS_WHERE_THERE_IS_ANY = "2"
"""NCCL's default; its 1 fails where the switches cannot."""


def _queues(layout: Layout, cluster: Cluster) -> int:
    """Hardware queues.

    Up to Hopper, communication that overlaps tp or cp must be queued before the compute it overlaps with, as only a
    single queue promises; expert dispatch that overlaps compute, Megatron-FSDP and Blackwell want many.
    """
    if BLACKWELL_OR_LATER.search(cluster.gpu.name):
        return 32
    many = layout.overlap_moe_expert_parallel_comm or layout.use_megatron_fsdp
    if (layout.tp > 1 or layout.cp > 1) and not many:
        return 1
    return 32 if layout.moe_token_dispatcher_type == "flex" else 8  # noqa: S105


RECORDED = ("CUBLAS_", "CUDA_", "GLOO_", "MEGATUNE_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_", "UCX_")
"""Prefixes of the variables that a measurement may depend on; of all others not even the name is kept."""
_RECORDED_NAMES = frozenset({"LD_LIBRARY_PATH", "MKL_NUM_THREADS", "OMP_NUM_THREADS"})
_SECRET_WORDS = re.compile(
    r"TOKEN|SECRET|PASSW|PWD|CREDENTIAL|AUTH|(^|_)(API_?|ACCESS_?|PRIVATE_?)?KEYS?(_|$)"
)
_KEY_LIKE = re.compile(r"[A-Za-z0-9_=+-]{24,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{32,}")
_DEVICE = re.compile(r"\b(GPU|MIG)-[0-9a-f-]{36}\b")
_KEY_BITS = 3.5
"""Shannon's entropy a character of a word of random letters and digits is above 4, of an identifier's below 3.5,
random hexadecimal digits are between: 3.6 for 24 of them."""


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that a measurement may depend on, by name, without any that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _RECORDED_NAMES or name.startswith(RECORDED)) and not looks_secret(name, value)
    }


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable may hold a secret: by its name, a URL with a password in it, or a word without a pattern."""
    if _SECRET_WORDS.search(name.upper()):
        return True
    return any(_has_password(word) or _is_random(word) for word in re.split(r"[\s,;\"']+", value))


def _has_password(word: str) -> bool:
    try:
        return urlsplit(word).password is not None
    except ValueError:  # what is no URL has no password in it, but one that cannot be read may
        return "@" in word


def _is_random(word: str) -> bool:
    """Whether a word holds a run of characters as keys have it: long, with digits, and too mixed for a name."""
    word = _DEVICE.sub("", word)
    runs = _KEY_LIKE.findall(word) + ([] if word.startswith("/") else _BASE64.findall(word))
    return any(any(each.isdigit() for each in run) and _entropy_bits(run) > _KEY_BITS for run in runs)


def _entropy_bits(text: str) -> float:
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
