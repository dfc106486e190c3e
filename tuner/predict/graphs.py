"""CUDA graphs: the launches that they save the host, and the memory that captured layers need for the whole run.

Megatron captures the parts of a layer that `cuda_graph_scope` names as one graph per layer and micro-batch in flight,
or the whole iteration as one graph (megatron/core/transformer/cuda_graphs.py, TECudaGraphHelper). Each pass through a
layer replays its graph.
"""

from typing import Final

import numpy as np

from tuner.core.columns import Bools, Columns, Floats, Ints

REPLAY: Final = 0.06
"""Time of the host for one replay of a graph, as a multiple of the time to launch a dense layer's pass; a replay copies
the inputs to the addresses from which the graph reads. Assumed: a replay takes about five launches, and the pass of a
layer 80."""
HALF: Final = 0.5
"""Share of a dense layer's launches that belong to attention and its norm. The MLP of a dense layer has the other half.
In a layer with experts, the router has as many launches as this MLP, and so has the preparation of the dispatch.
Measured: counted with FORWARD_LAUNCHES (tuner/predict/time/model_parts.py), which is 80."""
STATIC_STATES: Final = 2
"""Hidden states that a captured layer needs per micro-batch in flight: the output of its graph, and the gradient that
the graph receives. The input of the graph replaces the input that autograd saves anyway. Assumed; for published layouts
it agrees with Megatron Bridge's guide (docs/training/cuda-graphs.md), which says a few GB, and more than 10 GB with a
pipeline."""
ITERATION_SHARE: Final = 0.06
"""Additional memory of a graph of the whole iteration, as a share of the activations at the peak: a graph has a memory
pool of its own. Published: 153 GiB instead of 143 GiB in a Llama 3.1 70B (github.com/pytorch/torchtitan/pull/2050)."""


def captures(c: Columns) -> Bools:
    """Return a mask of the layouts that capture any CUDA graph; shape [rows]."""
    captured: Bools = ~c.among("cuda_graph_impl", "none")
    return captured


def whole_iteration(c: Columns) -> Bools:
    """Return a mask of the layouts that capture the whole forward and backward pass as one CUDA graph; shape [rows]."""
    return captures(c) & c.text("cuda_graph_scope", lambda scope: "full_iteration" in scope.split("+"))


def launches(c: Columns, moe: bool, eager: Floats | float) -> Floats | float:
    """Return how many operations the host launches per pass through a layer; one value per layout.

    The number is a multiple of the operations of one pass through a dense layer without graphs. A replay of a graph
    counts as `REPLAY` of such a pass.

    Args:
        c: The layouts.
        moe: Whether the layer has experts.
        eager: The number without graphs, as such a multiple.
    """
    graph = captures(c)
    if not graph.any():
        return eager
    column = c.column("cuda_graph_scope")
    captured = np.array([_captured_launches(scope, moe) for scope in column.categories])[column.codes]
    left = np.maximum(eager - captured, 0.0) + np.where(captured > 0, REPLAY, 0.0)
    return np.where(graph, np.minimum(left, eager), eager)


def _captured_launches(scope: str, moe: bool) -> float:
    """Return how many launches a CUDA graph of the given `cuda_graph_scope` replaces in one pass through a layer.

    The number is a multiple of the launches of a dense layer's pass, or infinity if the graph replaces all launches.
    `moe` says whether the layer has experts.
    """
    parts = set(scope.split("+"))
    if parts & {"none", "full_iteration"}:
        return np.inf
    of_mlp = {"moe": np.inf, "moe_router": HALF, "moe_preprocess": HALF} if moe else {"mlp": HALF}
    of_part = {"attn": HALF} | of_mlp
    return sum(of_part.get(part, 0.0) for part in parts)


def static_bytes(c: Columns, row: Ints, layers: Floats, state: Floats, activations: Floats) -> Floats:
    """Return the bytes that CUDA graphs need on each stage in addition to saved activations; shape [stages].

    Args:
        c: The layouts.
        row: Index in `c` of the layout of each stage.
        layers: Layers in flight on each stage, summed over all micro-batches in flight.
        state: Bytes of one hidden state, one value per layout.
        activations: Bytes of activations on each stage at its peak.
    """
    of_layers = STATIC_STATES * layers * state[row]
    held = np.where(whole_iteration(c)[row], ITERATION_SHARE * activations, of_layers)
    return np.where(captures(c)[row], held, 0.0)
