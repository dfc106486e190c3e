"""Look-ups in a table of layouts, and rows that are added to it."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from tests.replay import sweep_of, table_of
from tuner.core.layout import Layout
from tuner.space.table import RowIndex, find_row, layout_at, layouts_at, with_row, with_rows

TABLE = table_of(sweep_of())


@given(st.integers(0, len(TABLE) - 1))
def test_a_layout_is_found_where_it_stands(row: int) -> None:
    assert find_row(TABLE, layout_at(TABLE, row)) == row


def test_a_layout_outside_the_table_is_not_found() -> None:
    assert find_row(TABLE, Layout(tp=2, cp=2)) is None


def test_a_row_outside_the_table_is_appended_once_and_keeps_the_others() -> None:
    outside = Layout(tp=1, cp=2, recompute_granularity="selective", recompute_modules="core_attn")
    joined = with_row(TABLE, outside)
    assert len(joined) == len(TABLE) + 1
    assert layout_at(joined, len(TABLE)) == outside
    assert [layout_at(joined, row) for row in range(3)] == [layout_at(TABLE, row) for row in range(3)]
    assert with_row(joined, outside) is joined
    inside = layout_at(TABLE, 2)
    assert with_row(TABLE, inside) is TABLE
    kinds = joined.dtypes[["tp", "sp", "micro_batch_size"]]
    pd.testing.assert_series_equal(kinds, TABLE.dtypes[["tp", "sp", "micro_batch_size"]])


@given(st.integers(0, len(TABLE) - 1))
def test_an_index_finds_what_a_scan_finds(row: int) -> None:
    layout = layout_at(TABLE, row)
    assert RowIndex(TABLE).find(layout) == row
    assert layouts_at(TABLE, [row, 0]) == [layout, layout_at(TABLE, 0)]


def test_an_index_finds_the_first_of_equal_rows_and_no_layout_outside_the_table() -> None:
    index = RowIndex(pd.concat([TABLE, TABLE], ignore_index=True))
    assert index.find(layout_at(TABLE, 3)) == 3
    assert index.find(Layout(tp=2, cp=2)) is None
    assert index.find(Layout(recompute_granularity="selective", recompute_modules="core_attn")) is None


def test_several_rows_are_appended_as_one_after_the_other() -> None:
    outside = [Layout(cp=2), Layout(cp=4, recompute_modules="moe_act"), Layout(cp=2)]
    one_by_one = with_row(with_row(TABLE, outside[0]), outside[1])
    pd.testing.assert_frame_equal(with_rows(TABLE, [*outside, layout_at(TABLE, 2)]), one_by_one)
    assert with_rows(TABLE, [layout_at(TABLE, 2)]) is TABLE
