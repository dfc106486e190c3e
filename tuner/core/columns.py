"""A table of layouts as columns: one array per knob, all of equal length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.layout import KNOBS, Layout, module_names, recomputed_modules

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Texts(NamedTuple):
    """A column of texts that holds each distinct text once, so that a test runs once per text and not once per row."""

    codes: NDArray[np.int8]
    """Index in `categories` of the text of each row."""
    categories: Sequence[str]
    """The distinct texts."""


class Columns:
    """The knobs of many layouts: one array per knob (`Texts` for texts), all of equal length.

    Sizes are returned as int64, so that their products cannot overflow. "The rows where" a condition holds are returned
    as a mask of shape [rows].
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def column(self, knob: str) -> Any:
        """Return the column of a knob as it is stored: an array, or `Texts`."""
        return self._data[knob]

    def __getitem__(self, knob: str) -> Ints:
        """Return the values of a size knob."""
        return np.asarray(self.column(knob), dtype=np.int64)

    def on(self, knob: str) -> Bools:
        """Return the rows where the switch `knob` is on."""
        return np.asarray(self.column(knob), dtype=np.bool_)

    def text(self, knob: str, accepts: Callable[[str], bool]) -> Bools:
        """Return the rows where `accepts` is true of the text of `knob`; it is called once per distinct text."""
        column = self.column(knob)
        accepted = np.array([accepts(category) for category in column.categories], dtype=np.bool_)
        mask: Bools = accepted[column.codes]
        return mask

    def text_sizes(self, knob: str, size: Callable[[str], int]) -> Ints:
        """Return the result of `size` for the text of `knob` in every row; it is called once per distinct text."""
        column = self.column(knob)
        sizes = np.array([size(category) for category in column.categories], dtype=np.int64)
        return np.asarray(sizes[column.codes], dtype=np.int64)

    def among(self, knob: str, *values: str) -> Bools:
        """Return the rows where the text of `knob` is one of `values`."""
        return self.text(knob, lambda text: text in values)

    def text_with(self, knob: str, size: str, accepts: Callable[[str, int], bool]) -> Bools:
        """Return the rows where `accepts` is true of the text of `knob` and the value of the size knob `size`.

        `accepts` is called once per pair of a distinct text and a distinct size.
        """
        column, sizes = self.column(knob), self[size]
        accepted = np.zeros((len(column.categories), int(sizes.max(initial=0)) + 1), dtype=np.bool_)
        for number in np.flatnonzero(np.bincount(sizes)):
            accepted[:, number] = [accepts(category, int(number)) for category in column.categories]
        mask: Bools = accepted[column.codes, sizes]
        return mask

    def recomputes(self, module: str) -> Bools:
        """Return the rows where `recompute_modules` names `module`, whatever the granularity."""
        return self.text("recompute_modules", lambda text: module in module_names(text))

    def drops(self, module: str) -> Bools:
        """Return the rows where selective recompute drops `module`, by its name or by default."""
        dropped = self.text("recompute_modules", lambda text: module in recomputed_modules(text))
        return self.among("recompute_granularity", "selective") & dropped

    def graphs(self, part: str) -> Bools:
        """Return the rows where the scope of CUDA graphs names `part`."""
        return self.text("cuda_graph_scope", lambda text: part in module_names(text))

    @classmethod
    def of(cls, table: pd.DataFrame) -> Self:
        """Return the knobs of a table of layouts."""
        return cls({knob: _column(table[knob]) for knob in KNOBS if knob in table})

    @classmethod
    def single(cls, layout: Layout) -> Self:
        """Return the knobs of one layout, as columns of length 1."""
        values = {knob: getattr(layout, knob) for knob in KNOBS}
        return cls({k: Texts(_ZERO, [v]) if isinstance(v, str) else np.array([v]) for k, v in values.items()})


_ZERO = np.zeros(1, dtype=np.int8)
"""The codes of a column with one row, whose text is the first category."""


def _column(series: "pd.Series[Any]") -> Any:
    """Return a column of a table as `Columns` holds it: an array of numbers or switches, or `Texts`."""
    if pd.api.types.is_numeric_dtype(series.dtype):
        return series.to_numpy()
    categorical = pd.Categorical(series)
    return Texts(categorical.codes, list(categorical.categories))
