"""The implementation of the layers that a trial runs, on which both predictions depend."""

from typing import Literal

from tuner.core.cluster import Cluster

Implementation = Literal["transformer_engine", "torch"]
"""`transformer_engine` has Transformer Engine's fused layers. `torch` has Megatron's local modules, which keep
attention scores and logits in memory."""


def implementation_of(cluster: Cluster) -> Implementation:
    """Return the implementation that the built-in program runs: Transformer Engine's on CUDA, Torch's on CPU."""
    return "transformer_engine" if cluster.device == "cuda" else "torch"
