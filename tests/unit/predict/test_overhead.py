"""What a GPU holds beside tensors grows with the groups in which a rank communicates; on CPU it is nothing."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model
from tuner.predict.memory.overhead import (
    COMMUNICATOR_GIB,
    CONTEXT_GIB,
    PEER_GIB,
    beyond_allocated_gib,
    group_sizes,
    reserved_ratio,
)


def table(*layouts: Layout) -> pd.DataFrame:
    return pd.DataFrame([asdict(layout) for layout in layouts])


def communicators(model: Model, gpus: int, **knobs: Any) -> int:
    sizes = group_sizes(Columns.single(Layout(**knobs)), model, cluster(gpus))
    return sum(int(size[0]) > 1 for size in sizes)


def test_a_single_gpu_needs_only_its_context() -> None:
    beyond_gib = beyond_allocated_gib(table(Layout()), workload(dense()), cluster(1))
    assert beyond_gib.tolist() == [CONTEXT_GIB]


@pytest.mark.parametrize(
    ("knobs", "groups"),
    [
        ({}, 3),  # the world twice, and data parallel
        ({"tp": 8}, 3),  # the data parallel group has one rank
        ({"tp": 2, "pp": 2}, 5),
        ({"tp": 2, "cp": 2, "pp": 2}, 6),  # the data parallel group of the gradients runs over cp
    ],
)
def test_every_group_of_several_ranks_has_a_communicator(knobs: dict[str, int], groups: int) -> None:
    assert communicators(dense(), 8, **knobs) == groups


def test_a_shared_embedding_joins_the_ends_of_the_pipeline() -> None:
    tied = dense(share_embeddings_and_output_weights=True)
    assert communicators(tied, 8, pp=2) == communicators(dense(), 8, pp=2) + 1
    assert communicators(tied, 8) == communicators(dense(), 8)


def test_experts_add_their_groups_and_a_buffer_for_each_peer() -> None:
    of, on = workload(mixture()), cluster(8)
    none, four = beyond_allocated_gib(table(Layout(), Layout(ep=4)), of, on)
    # The groups of ep, of tp and ep, and of the two ranks with equal experts.
    assert four - none == pytest.approx(3 * COMMUNICATOR_GIB + 3 * PEER_GIB)


def test_peers_over_the_network_share_their_buffers() -> None:
    of, layouts = workload(mixture()), table(Layout(ep=8))
    near = beyond_allocated_gib(layouts, of, cluster(16))
    far = beyond_allocated_gib(layouts, of, replace(cluster(16), nvlink_domain_gpus=2))
    assert near - far == pytest.approx(6 * PEER_GIB)


def test_cpu_ranks_hold_only_tensors() -> None:
    on = replace(cluster(8), device="cpu")
    assert np.array_equal(beyond_allocated_gib(table(Layout(tp=2)), workload(dense()), on), [0.0])
    assert reserved_ratio(table(Layout()), on) == 1.0 < reserved_ratio(table(Layout()), cluster(8))
