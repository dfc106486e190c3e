"""CUDA graphs: what the host no longer launches one by one, and what a captured layer holds for good.

A graph is replayed for every pass through a layer, or one for the whole iteration. Megatron captures the parts of a
layer that `cuda_graph_scope` names as one graph a layer and micro-batch in flight (megatron/core/transformer/
cuda_graphs.py, TECudaGraphHelper).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.columns import Bools, Columns

Floats = NDArray[np.float64]

REPLAY: Final = 0.06
"""Launches of a replay, its inputs copied to where the graph reads them, over those of a dense layer's pass."""
HALF: Final = 0.5
"""Of a dense layer's launches: attention's with its norm; likewise the MLP's, a mixture's router's and its dispatch's
preparation (of 80, as counted for FORWARD_LAUNCHES)."""
STATIC_STATES: Final = 2
"""Hidden states a captured layer and micro-batch in flight holds: its graph's output, and the gradient that it is
given; the input takes the place of what the layer keeps anyway. Megatron Bridge's guide (docs/training/cuda-graphs.md)
says a few GB, and more than 10 with a pipeline, which this is for published layouts."""
ITERATION_SHARE: Final = 0.06
"""Of what activations hold at the peak, what a graph of all of it needs beside them, since its memory is its own: 153
GiB for 143 in a Llama 3.1 70B (github.com/pytorch/torchtitan/pull/2050)."""


def captures(c: Columns) -> Bools:
    """Where anything is captured."""
    captured: Bools = ~c.among("cuda_graph_impl", "none")
    return captured


def whole_iteration(c: Columns) -> Bools:
    """Where one graph is the whole forward and backward pass."""
    return captures(c) & c.text("cuda_graph_scope", lambda scope: "full_iteration" in scope.split("+"))


def launches(c: Columns, moe: bool, eager: Floats | float) -> Floats | float:
    """What the host launches in a layer, in dense layers' passes; without a graph it launches `eager`."""
    graph = captures(c)
    if not graph.any():
        return eager

    def parts(scope: str) -> float:
        names = set(scope.split("+"))
        if names & {"none", "full_iteration"}:
            return np.inf
        own = {"attn": HALF} | ({"moe_router": HALF, "moe_preprocess": HALF} if moe else {"mlp": HALF})
        own |= {"moe": np.inf} if moe else {}
        return sum(own.get(name, 0.0) for name in names)

    column = c.column("cuda_graph_scope")
    captured = np.array([parts(scope) for scope in column.categories])[column.codes]
    left = np.maximum(eager - captured, 0.0) + np.where(captured > 0, REPLAY, 0.0)
    return np.where(graph, np.minimum(left, eager), eager)


def static_bytes(
    c: Columns, row: NDArray[np.int64], layers: Floats, state: Floats, activations: Floats
) -> Floats:
    """Bytes that graphs of stages of layouts `row` hold beside what passes keep: of `layers` in flight, or of all
    `activations` at the peak.
    """
    one_each = STATIC_STATES * layers * state[row]
    held = np.where(whole_iteration(c)[row], ITERATION_SHARE * activations, one_each)
    return np.where(captures(c)[row], held, 0.0)
