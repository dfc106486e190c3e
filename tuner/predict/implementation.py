"""Whose layers a trial runs, which both predictions depend on."""

from typing import Literal

from tuner.core.cluster import Cluster

Implementation = Literal["transformer_engine", "torch"]
"""Whose layers a trial runs. `torch` is Megatron's local modules, which keep attention scores and logits in memory."""


def implementation_of(cluster: Cluster) -> Implementation:
    """Whose layers the built-in program runs there: Transformer Engine's on CUDA, Torch's on CPU."""
    return "transformer_engine" if cluster.device == "cuda" else "torch"
