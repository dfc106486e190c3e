"""Which implementation of the layers a trial runs. The predictions of memory and of time depend on it."""

from typing import Literal

from tuner.core.cluster import Cluster

Implementation = Literal["transformer_engine", "torch"]
"""`transformer_engine` has Transformer Engine's fused layers. `torch` has Megatron's local modules, which save
attention scores and logits."""


def implementation_of(cluster: Cluster) -> Implementation:
    """Return the implementation that the built-in program runs: Transformer Engine's on CUDA, Torch's on CPU."""
    return "transformer_engine" if cluster.device == "cuda" else "torch"
