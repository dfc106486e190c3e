"""What a layout will need and take, before it runs: peak memory and step time, vectorised over the table."""

from typing import Literal

from tuner.cluster import Cluster

Implementation = Literal["transformer_engine", "torch"]
"""Whose layers a trial runs. `torch` is Megatron's local modules, which keep attention scores and logits in memory."""


def implementation_of(cluster: Cluster) -> Implementation:
    """Whose layers the built-in program runs there: Transformer Engine's on CUDA, Torch's on CPU."""
    return "transformer_engine" if cluster.device == "cuda" else "torch"
