"""A table of layouts as columns: one array per knob, all of equal length."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tuner.core.layout import KNOBS, Layout, module_names, recomputed_modules

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Texts(NamedTuple):
    """A column of texts that stores each distinct text once, so that a condition is checked once per distinct text."""

    codes: NDArray[np.int8]
    """For each row, the index of its text in `categories`."""
    categories: Sequence[str]
    """The distinct texts."""


class Columns:
    """The knobs of many layouts: one array per knob (`Texts` for texts), all of equal length.

    Integers are returned as int64, so that their products cannot overflow. A mask is an array of shape [rows] with one
    bool per layout.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def column(self, knob: str) -> Any:
        """Return the column of a knob as it is stored: an array of numbers or bools, or `Texts`."""
        return self._data[knob]

    def __getitem__(self, knob: str) -> Ints:
        """Return the column of a knob that has integer values, such as `tp`."""
        return np.asarray(self.column(knob), dtype=np.int64)

    def on(self, knob: str) -> Bools:
        """Return a mask of the rows where the switch `knob` is on."""
        return np.asarray(self.column(knob), dtype=np.bool_)

    def text(self, knob: str, accepts: Callable[[str], bool]) -> Bools:
        """Return a mask of the rows where `accepts` returns True for the text of `knob`.

        `accepts` is called once per distinct text.
        """
        column = self.column(knob)
        accepted = np.array([accepts(category) for category in column.categories], dtype=np.bool_)
        mask: Bools = accepted[column.codes]
        return mask

    def text_sizes(self, knob: str, size: Callable[[str], int]) -> Ints:
        """Return, for every row, the integer that `size` returns for the row's text of `knob`.

        `size` is called once per distinct text.
        """
        column = self.column(knob)
        sizes = np.array([size(category) for category in column.categories], dtype=np.int64)
        return np.asarray(sizes[column.codes], dtype=np.int64)

    def among(self, knob: str, *values: str) -> Bools:
        """Return a mask of the rows where the text of `knob` is one of `values`."""
        return self.text(knob, lambda text: text in values)

    def text_with(self, knob: str, size: str, accepts: Callable[[str, int], bool]) -> Bools:
        """Return a mask of the rows where `accepts` returns True for the text of `knob` and the value of `size`.

        `size` is the name of a knob that has integer values. `accepts` is called once per pair of a distinct text and a
        distinct integer.
        """
        column, sizes = self.column(knob), self[size]
        accepted = np.zeros((len(column.categories), int(sizes.max(initial=0)) + 1), dtype=np.bool_)
        for number in np.flatnonzero(np.bincount(sizes)):
            accepted[:, number] = [accepts(category, int(number)) for category in column.categories]
        mask: Bools = accepted[column.codes, sizes]
        return mask

    def recomputes(self, module: str) -> Bools:
        """Return a mask of the rows where `recompute_modules` names `module`, whatever `recompute_granularity` is."""
        return self.text("recompute_modules", lambda text: module in module_names(text))

    def drops(self, module: str) -> Bools:
        """Return a mask of the rows where selective recomputation recomputes `module`.

        It does so if `recompute_modules` names the module, or is `none` and the module is Megatron's default.
        """
        dropped = self.text("recompute_modules", lambda text: module in recomputed_modules(text))
        return self.among("recompute_granularity", "selective") & dropped

    def graphs(self, part: str) -> Bools:
        """Return a mask of the rows where `cuda_graph_scope` names `part`, such as `attn`."""
        return self.text("cuda_graph_scope", lambda text: part in module_names(text))

    @classmethod
    def of(cls, table: "pd.DataFrame") -> Self:
        """Return the columns of a table of layouts, which has one column per knob; its other columns are left out."""
        return cls({knob: _column(table[knob]) for knob in KNOBS if knob in table})

    @classmethod
    def single(cls, layout: Layout) -> Self:
        """Return the columns of one layout, each of length 1."""
        values = {knob: getattr(layout, knob) for knob in KNOBS}
        return cls({k: Texts(_ZERO, [v]) if isinstance(v, str) else np.array([v]) for k, v in values.items()})


_ZERO = np.zeros(1, dtype=np.int8)
"""The codes of a text column that has one row and one category."""


def _column(series: "pd.Series[Any]") -> Any:
    """Return a column of a DataFrame in the form that `Columns` stores: an array of numbers or bools, or `Texts`."""
    import pandas as pd  # half of the time of a command that needs no table would go into this import

    if pd.api.types.is_numeric_dtype(series.dtype):
        return series.to_numpy()
    categorical = pd.Categorical(series)
    return Texts(categorical.codes, list(categorical.categories))
