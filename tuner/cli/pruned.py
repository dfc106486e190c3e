"""What `--pruned` prints: the valid layouts that pruning keeps from ever being launched."""

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

MOST_SHOWN: Final = 20
"""Largest number of rows that a terminal shows; `--json` shows all."""


def pruned_data(pruned: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return all pruned rows, as `tuner.explain.audit.pruned_rows` gives them, as JSON data."""
    return [
        {
            "layout": to_data(layout_from(record)),
            "reason": record["reason"],
            "predicted_gib": record["predicted_gib"],
            "fit": record["fit"],
            "trial": record["trial"] if record["trial"] >= 0 else None,
            "along": record["along"],
        }
        for record in _records(pruned)
    ]


def print_pruned(pruned: "pd.DataFrame", valid: int) -> None:
    """Print how many of the `valid` layouts each reason removes, and the removed ones that are likeliest to fit."""
    stdout.print(f"\n{len(pruned):,} of {valid:,} valid layouts are never launched", highlight=False)
    for reason, count in pruned["reason"].value_counts().items():
        stdout.print(f"  {count:,} {reason}", highlight=False)
    if pruned.empty:
        return
    table = Table("layout", "reason", box=None, pad_edge=False)
    for heading in ("predicted\nGiB", "P(fit)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("trial")
    table.add_column("upwards along")
    likeliest = pruned.sort_values("fit", ascending=False, kind="stable").head(MOST_SHOWN)
    for record in _records(likeliest):
        table.add_row(
            layout_from(record).label(),
            record["reason"],
            f"{record['predicted_gib']:.3g}",
            f"{record['fit']:.1%}",
            f"t{record['trial']:04d}" if record["trial"] >= 0 else "",
            record["along"],
        )
    stdout.print(table)
    if len(pruned) > MOST_SHOWN:
        stdout.print(f"and {len(pruned) - MOST_SHOWN:,} more, all with --json")


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in record.items()} for record in table.to_dict("records")]
