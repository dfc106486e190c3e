"""Look-ups in a table of layouts, and rows that are added to it."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from tests.replay import sweep_of, table_of
from tuner.core.layout import Layout
from tuner.space.table import find_row, layout_at, with_row

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
