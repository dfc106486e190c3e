"""What `--pruned` prints: the layouts that pruning keeps from ever being launched."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from tuner.cli.common import stdout
from tuner.core.layout import layout_from
from tuner.files import to_data

if TYPE_CHECKING:
    import pandas as pd

Pruned = Annotated[
    bool, typer.Option("--pruned", help="List the valid layouts that are never launched, and why.")
]

SHOWN: Final = 20
"""Rows of a terminal's list; `--json` gives all."""


def pruned_data(removed: "pd.DataFrame") -> list[dict[str, Any]]:
    """Every removed row (tuner.explain.audit) as JSON data."""
    return [
        {
            "layout": to_data(layout_from(row)),
            "reason": row["reason"],
            "predicted_gib": row["predicted_gib"],
            "fit": row["fit"],
            "trial": row["trial"] if row["trial"] >= 0 else None,
            "along": row["along"],
        }
        for row in _records(removed)
    ]


def print_pruned(removed: "pd.DataFrame", valid: int) -> None:
    """Print the count of each reason, then the rows likeliest to fit, of the `valid` layouts of a sweep."""
    stdout.print(f"\n{len(removed):,} of {valid:,} valid layouts are never launched", highlight=False)
    for reason, count in removed["reason"].value_counts().items():
        stdout.print(f"  {count:,} {reason}", highlight=False)
    if removed.empty:
        return
    table = Table("layout", "reason", box=None, pad_edge=False)
    for heading in ("predicted\nGiB", "P(fit)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("trial")
    table.add_column("upwards along")
    for row in _records(removed.sort_values("fit", ascending=False, kind="stable").head(SHOWN)):
        trial = f"t{row['trial']:04d}" if row["trial"] >= 0 else ""
        figures = (f"{row['predicted_gib']:.3g}", f"{row['fit']:.1%}")
        table.add_row(layout_from(row).label(), row["reason"], *figures, trial, row["along"])
    stdout.print(table)
    if len(removed) > SHOWN:
        stdout.print(f"and {len(removed) - SHOWN:,} more, all with --json")


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
