"""Tables of layouts as columns: one array per knob, all of one length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuner.core.layout import KNOBS, Layout, module_names

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


Bools = NDArray[np.bool_]


class Texts(NamedTuple):
    """A column of texts, so that a question about one is asked once a category, not once a row."""

    codes: NDArray[np.int8]
    """A row's index in `categories`."""
    categories: Sequence[str]


class Columns:
    """The knobs of many layouts: one array a knob (Texts for texts), all of one length.

    Sizes widen to int64, so that products cannot overflow.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def column(self, knob: str) -> Any:
        """The column as it is held."""
        return self._data[knob]

    def __getitem__(self, knob: str) -> Ints:
        """The values of a size knob."""
        return np.asarray(self.column(knob), dtype=np.int64)

    def on(self, knob: str) -> Bools:
        """Where a switch is on."""
        return np.asarray(self.column(knob), dtype=np.bool_)

    def text(self, knob: str, accepts: Callable[[str], bool]) -> Bools:
        """Where `accepts` holds for a text knob."""
        column = self.column(knob)
        accepted = np.array([accepts(category) for category in column.categories], dtype=np.bool_)
        mask: Bools = accepted[column.codes]
        return mask

    def text_sizes(self, knob: str, size: Callable[[str], int]) -> Ints:
        """The size that `size` says of a text knob's value."""
        column = self.column(knob)
        sizes = np.array([size(category) for category in column.categories], dtype=np.int64)
        return np.asarray(sizes[column.codes], dtype=np.int64)

    def among(self, knob: str, *values: str) -> Bools:
        """Where a text knob has one of `values`."""
        return self.text(knob, lambda text: text in values)

    def text_with(self, knob: str, size: str, accepts: Callable[[str, int], bool]) -> Bools:
        """Where `accepts` holds for a text knob and a size: asked once for each of the pairs that can be."""
        column, sizes = self.column(knob), self[size]
        accepted = np.zeros((len(column.categories), int(sizes.max(initial=0)) + 1), dtype=np.bool_)
        for number in np.flatnonzero(np.bincount(sizes)):
            accepted[:, number] = [accepts(category, int(number)) for category in column.categories]
        mask: Bools = accepted[column.codes, sizes]
        return mask

    def recomputes(self, module: str) -> Bools:
        """Where selective recompute names `module`."""
        return self.text("recompute_modules", lambda text: module in module_names(text))

    def graphs(self, part: str) -> Bools:
        """Where the scope of CUDA graphs names `part`."""
        return self.text("cuda_graph_scope", lambda text: part in module_names(text))

    @classmethod
    def of(cls, table: pd.DataFrame) -> Self:
        """The knobs of a table of layouts."""
        return cls({knob: _column(table[knob]) for knob in KNOBS if knob in table})

    @classmethod
    def single(cls, layout: Layout) -> Self:
        """The knobs of one layout, as columns of length 1."""
        values = {knob: getattr(layout, knob) for knob in KNOBS}
        return cls({k: Texts(_ZERO, [v]) if isinstance(v, str) else np.array([v]) for k, v in values.items()})


_ZERO = np.zeros(1, dtype=np.int8)


def _column(series: "pd.Series[Any]") -> Any:
    if pd.api.types.is_numeric_dtype(series.dtype):
        return series.to_numpy()
    categorical = pd.Categorical(series)
    return Texts(categorical.codes, list(categorical.categories))
