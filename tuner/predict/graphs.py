"""CUDA graphs: the launches that they save the host, and the memory that captured layers hold for the whole run.

Megatron captures the parts of a layer that `cuda_graph_scope` names as one graph per layer and micro-batch in flight,
or the whole iteration as one graph (megatron/core/transformer/cuda_graphs.py, TECudaGraphHelper). Each pass through a
layer replays its graph.
"""

from typing import Final

import numpy as np

from tuner.core.columns import Bools, Columns, Floats, Ints

REPLAY: Final = 0.06
"""Launches of one replay of a graph, as a share of the launches of a dense layer's pass; a replay copies the inputs to
where the graph reads them. Assumed: a replay takes about five launches, and the pass of a layer 80."""
HALF: Final = 0.5
"""Share of a dense layer's launches that attention and its norm take. The MLP of a dense layer takes as many, and so do
the router and the preparation of the dispatch in a layer with experts. Measured: counted with FORWARD_LAUNCHES
(tuner/predict/time), which is 80."""
STATIC_STATES: Final = 2
"""Hidden states that a captured layer holds per micro-batch in flight: the output of its graph, and the gradient that
the graph receives. The input of the graph takes the place of what the layer keeps anyway. Assumed; for published
layouts it gives what Megatron Bridge's guide (docs/training/cuda-graphs.md) says: a few GB, and more than 10 GB with a
pipeline."""
ITERATION_SHARE: Final = 0.06
"""Memory that a graph of the whole iteration needs beside its activations, as a share of what these hold at the peak,
since the memory of a graph is its own. Published: 153 GiB instead of 143 GiB in a Llama 3.1 70B
(github.com/pytorch/torchtitan/pull/2050)."""


def captures(c: Columns) -> Bools:
    """Return the rows where any graph is captured."""
    captured: Bools = ~c.among("cuda_graph_impl", "none")
    return captured


def whole_iteration(c: Columns) -> Bools:
    """Return the rows where one graph holds the whole forward and backward pass."""
    return captures(c) & c.text("cuda_graph_scope", lambda scope: "full_iteration" in scope.split("+"))


def launches(c: Columns, moe: bool, eager: Floats | float) -> Floats | float:
    """Return the host's launches per pass through a layer, as a multiple of a dense layer's.

    Args:
        c: The layouts.
        moe: Whether the layer has experts.
        eager: The host's launches without graphs, as a multiple of a dense layer's.
    """
    graph = captures(c)
    if not graph.any():
        return eager
    column = c.column("cuda_graph_scope")
    captured = np.array([_captured_launches(scope, moe) for scope in column.categories])[column.codes]
    left = np.maximum(eager - captured, 0.0) + np.where(captured > 0, REPLAY, 0.0)
    return np.where(graph, np.minimum(left, eager), eager)


def _captured_launches(scope: str, moe: bool) -> float:
    """Return the launches that a graph of a scope replaces, in launches of a dense layer's pass."""
    parts = set(scope.split("+"))
    if parts & {"none", "full_iteration"}:
        return np.inf
    of_mlp = {"moe": np.inf, "moe_router": HALF, "moe_preprocess": HALF} if moe else {"mlp": HALF}
    of_part = {"attn": HALF} | of_mlp
    return sum(of_part.get(part, 0.0) for part in parts)


def static_bytes(c: Columns, row: Ints, layers: Floats, state: Floats, activations: Floats) -> Floats:
    """Return the bytes that graphs hold on each stage beside what passes keep.

    Args:
        c: The layouts.
        row: Index of the layout of each stage.
        layers: Layers in flight on each stage, over all micro-batches.
        state: Bytes of a hidden state, one value per layout.
        activations: Bytes of activations on each stage at its peak.
    """
    of_layers = STATIC_STATES * layers * state[row]
    held = np.where(whole_iteration(c)[row], ITERATION_SHARE * activations, of_layers)
    return np.where(captures(c)[row], held, 0.0)
