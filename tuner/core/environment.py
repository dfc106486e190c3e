"""Environment variables: those that a layout sets in a CUDA job, and those that are recorded with a trial."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from urllib.parse import urlsplit

from tuner.core.cluster import Cluster
from tuner.core.layout import Layout

BLACKWELL_OR_LATER = re.compile(r"\b(GB|B|VR|R)\d{3}\b", re.IGNORECASE)
"""Matches the name of a GPU of the Blackwell generation or of a later one."""
NVLS_IF_AVAILABLE = "2"
"""The value of NCCL_NVLS_ENABLE with which NCCL reduces inside NVLink's switches if the hardware can do so, NCCL's
default. With the value 1, NCCL fails on other hardware."""

_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variables with the settings of torch's CUDA allocator; the first outranks the second."""


def cuda_environment(layout: Layout, cluster: Cluster, complete: bool = False) -> dict[str, str]:
    """Return the environment variables that a CUDA job of this layout sets.

    HybridEP, one of the flex dispatchers, needs to know how many ranks of an expert-parallel group share an NVLink
    domain. With `expandable_segments`, NCCL must not register the memory that CUDA graphs use. Sources: Megatron-LM,
    arguments.py; Megatron Bridge, scripts/performance/utils/overrides.py and the `env_vars` of perf_recipes.

    Args:
        layout: The layout.
        cluster: The GPUs.
        complete: Whether to include the variables whose knob has its default value. They are needed if a recipe may set
            them to other values.
    """
    variables = {
        "CUDA_DEVICE_MAX_CONNECTIONS": str(
            layout.cuda_device_max_connections or _default_queues(layout, cluster)
        )
    }
    if layout.moe_token_dispatcher_type == "flex" and layout.moe_flex_dispatcher_backend == "hybridep":  # noqa: S105
        ranks = min(layout.ep, cluster.nvlink_domain_gpus)
        variables["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = str(ranks)
    if layout.expandable_segments or complete:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{layout.expandable_segments}"
    if layout.expandable_segments and layout.cuda_graph_impl != "none":
        variables["NCCL_GRAPH_REGISTER"] = "0"
    if not layout.nccl_nvls_enable or complete:
        variables["NCCL_NVLS_ENABLE"] = NVLS_IF_AVAILABLE if layout.nccl_nvls_enable else "0"
    return variables


def allocator_environment(layout: Layout, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a job's CUDA allocator has the layout's `expandable_segments`.

    Torch reads PYTORCH_ALLOC_CONF since 2.9 and prefers it to PYTORCH_CUDA_ALLOC_CONF, which older releases read. If
    the user has set either, both get the user's other settings and the layout's value; otherwise nothing is set.

    Args:
        layout: The layout.
        inherited: The variables that the job inherits.
    """
    stated = [inherited[name] for name in _ALLOCATOR_NAMES if inherited.get(name)]
    if not stated:
        return {}
    others = [
        setting
        for setting in stated[0].split(",")
        if setting.partition(":")[0].strip() not in {"", "expandable_segments"}
    ]
    value = ",".join([*others, f"expandable_segments:{layout.expandable_segments}"])
    return dict.fromkeys(_ALLOCATOR_NAMES, value)


def _default_queues(layout: Layout, cluster: Cluster) -> int:
    """Return the number of hardware queues (CUDA_DEVICE_MAX_CONNECTIONS) for a layout that does not state it.

    Up to the Hopper generation, communication of tp or cp that overlaps compute must be queued before that compute,
    which only a single queue guarantees. Expert dispatch that overlaps compute, Megatron-FSDP and Blackwell need many
    queues.
    """
    if BLACKWELL_OR_LATER.search(cluster.gpu.name):
        return 32
    many = layout.overlap_moe_expert_parallel_comm or layout.use_megatron_fsdp
    if (layout.tp > 1 or layout.cp > 1) and not many:
        return 1
    return 32 if layout.moe_token_dispatcher_type == "flex" else 8  # noqa: S105


RECORDED = ("CUBLAS_", "CUDA_", "GLOO_", "MEGATUNE_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_", "UCX_")
"""Prefixes of the names of variables that a measurement may depend on. Other variables are not recorded, not even by
name, except `_RECORDED_NAMES`."""
_RECORDED_NAMES = frozenset({"LD_LIBRARY_PATH", "MKL_NUM_THREADS", "OMP_NUM_THREADS"})
"""Names of further variables that a measurement may depend on."""
_SECRET_WORDS = re.compile(
    r"TOKEN|SECRET|PASSW|PWD|CREDENTIAL|AUTH|(^|_)(API_?|ACCESS_?|PRIVATE_?)?KEYS?(_|$)"
)
"""Matches the name of a variable that may contain a secret."""
_KEY_LIKE = re.compile(r"[A-Za-z0-9_=+-]{24,}")
"""Matches a run of characters that is long enough for a secret key."""
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{32,}")
"""Matches a run of characters that may be data in Base64; a path may match too."""
_DEVICE = re.compile(r"\b(GPU|MIG)-[0-9a-f-]{36}\b")
"""Matches the identifier of a GPU, which looks random but is no secret."""
_KEY_BITS = 3.5
"""Shannon entropy, in bits per character, above which a word is taken for a secret key. Assumed, between the entropy of
names and of keys: random letters and digits have more than 4, identifiers less than 3.5, and 24 random hexadecimal
digits 3.6."""


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a measurement may depend on, sorted by name, without any that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _RECORDED_NAMES or name.startswith(RECORDED)) and not looks_secret(name, value)
    }


def looks_secret(name: str, value: str) -> bool:
    """Return whether a variable may contain a secret.

    It may if its name contains a word such as TOKEN, or if its value contains a URL with a password or a word that
    looks random.
    """
    if _SECRET_WORDS.search(name.upper()):
        return True
    return any(_has_password(word) or _is_random(word) for word in re.split(r"[\s,;\"']+", value))


def _has_password(word: str) -> bool:
    try:
        return urlsplit(word).password is not None
    except ValueError:  # a URL that cannot be parsed may still hold a password
        return "@" in word


def _is_random(word: str) -> bool:
    """Return whether a word contains a run of characters that looks like a secret key.

    Such a run is long, contains a digit, and has an entropy above `_KEY_BITS`.
    """
    word = _DEVICE.sub("", word)
    runs = _KEY_LIKE.findall(word) + ([] if word.startswith("/") else _BASE64.findall(word))
    return any(any(char.isdigit() for char in run) and _entropy_bits(run) > _KEY_BITS for run in runs)


def _entropy_bits(text: str) -> float:
    """Return the Shannon entropy of a text, in bits per character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
