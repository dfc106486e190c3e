"""How layers lie on pipeline ranks and chunks: against Megatron's rules, worked out by hand."""

from dataclasses import asdict

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layouts import dense, workload
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.core.partition import Partition, partitions
from tuner.core.pipeline_layout import write
from tuner.core.workload import Model


def partition(layout: Layout, model: Model) -> Partition:
    """Return the partition of one layout."""
    split = partitions(Columns.single(layout), workload(model))
    assert split.of_row.tolist() == [0]
    return split.distinct[0]


def test_chunks_are_dealt_to_the_ranks_in_turns() -> None:
    split = partition(Layout(pp=2, vpp=2), dense(num_layers=8))
    assert split.begin.tolist() == [[0, 4], [2, 6]]
    assert split.end.tolist() == [[2, 6], [4, 8]]
    assert split.embeddings.tolist() == [[1, 0], [0, 0]]
    assert split.losses.tolist() == [[0, 0], [0, 1]]
    assert not split.is_written


def test_embedding_and_loss_take_the_place_of_a_layer_if_they_are_accounted_for() -> None:
    layout = Layout(
        pp=4, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    assert partition(layout, dense(num_layers=10)).layers.tolist() == [[2], [3], [3], [2]]
    alone = Layout(account_for_embedding_in_pipeline_split=True)
    assert partition(alone, dense(num_layers=10)).layers.tolist() == [[10]]


def test_stated_stages_hold_what_they_state_and_the_others_share_the_rest() -> None:
    layout = Layout(pp=4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3)
    assert partition(layout, dense(num_layers=8)).layers.tolist() == [[1], [2], [2], [3]]


def test_multi_token_prediction_is_where_the_loss_is_unless_a_text_says_otherwise() -> None:
    model = dense(num_layers=8, mtp_num_layers=1)
    assert partition(Layout(pp=2), model).mtp_layers.tolist() == [[0], [1]]
    written = Layout(pp=2, pipeline_model_parallel_layout="Et*4|t*4|m|L", vpp=2)
    assert partition(written, model).mtp_layers.tolist() == [[0, 1], [0, 0]]


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_a_written_partition_holds_what_the_text_says(counts: list[int]) -> None:
    chunks = [["t"] * count for count in counts]
    text = write([["E", *chunks[0]], *chunks[1:-1], [*chunks[-1], "L"]])
    layout = Layout(pp=2, vpp=2, pipeline_model_parallel_layout=text)
    split = partition(layout, dense(num_layers=max(sum(counts), 1)))
    assert split.is_written
    assert split.layers.tolist() == [[counts[0], counts[2]], [counts[1], counts[3]]]
    assert split.end.max() == sum(counts)


def test_layouts_that_split_their_layers_alike_share_a_partition() -> None:
    layouts = [Layout(pp=2), Layout(pp=4), Layout(pp=2, tp=2), Layout(pp=2, micro_batch_size=2)]
    split = partitions(Columns.of(pd.DataFrame(map(asdict, layouts))), workload(dense(num_layers=8)))
    assert len(split.distinct) == 2
    assert [len(split.distinct[index].begin) for index in split.of_row] == [2, 4, 2, 2]
