"""Which implementation of the layers a trial runs. The predictions of memory and of time depend on it."""

from typing import Literal

from tuner.core.cluster import Cluster

Implementation = Literal["transformer_engine", "torch_cuda", "torch"]
"""`transformer_engine` has Transformer Engine's fused layers. The others have Megatron's local modules: `torch_cuda` on
CUDA, where Torch has fused kernels for norms and attention, and `torch` on CPU."""


def implementation_of(cluster: Cluster) -> Implementation:
    """Return the implementation that the built-in program runs on a cluster."""
    if cluster.device == "cpu":
        return "torch"
    return "transformer_engine" if cluster.transformer_engine else "torch_cuda"
