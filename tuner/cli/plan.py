"""megatune plan: what a sweep would try, without starting anything."""

from math import ceil
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tuner.cli.common import AsJson, SweepPath, print_json, stdout
from tuner.cli.planning import load, prepare
from tuner.cli.pruned import Pruned, print_pruned, pruned_data
from tuner.core.choices import CHOICES
from tuner.files import to_data
from tuner.predict.implementation import implementation_of
from tuner.sweep.budget import Ledger

if TYPE_CHECKING:
    import pandas as pd

    from tuner.cli.planning import Loaded, Prepared
    from tuner.sweep.configuration import Sweep


def plan(sweep_file: SweepPath, pruned: Pruned = False, json: AsJson = False) -> None:
    """Count the valid layouts and what each rule removed, and list the first trials. Starts no process."""
    from tuner.explain.audit import pruned_rows

    loaded = load(sweep_file)
    prepared = prepare(loaded, sweep_file)
    sweep, table = loaded.sweep, loaded.space.table
    removed = pruned_rows(table, sweep.workload, sweep.cluster) if pruned else None
    finals = Ledger(
        budget=sweep.budget, world_size=sweep.cluster.world_size, trials=(), lost_s=0.0, deadline=None
    ).reserve()
    parts = _parts_of_search(sweep, prepared.table, sweep.budget.trials - finals)
    if json:
        removed_data = {} if removed is None else {"pruned": pruned_data(removed)}
        print_json({**_plan_data(loaded, prepared, parts), **removed_data})
        return
    _print_space(loaded, prepared)
    _print_trials(sweep, prepared, parts, finals)
    if removed is not None:
        print_pruned(removed, len(table))


def _rejections(loaded: "Loaded") -> dict[str, int]:
    """Return how many layouts each rule removed, most first; rules that removed none are left out."""
    rejected = sorted(loaded.space.rejected.items(), key=lambda item: -item[1])
    return {rule: count for rule, count in rejected if count}


def _plan_data(loaded: "Loaded", prepared: "Prepared", parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sweep": loaded.sweep.name,
        "combinations": loaded.space.combinations,
        "valid": len(loaded.space.table),
        "implementation": implementation_of(loaded.sweep.cluster),
        "predicted_too_large": prepared.too_large,
        "rejected": _rejections(loaded),
        "stages": parts,
        "queue": [
            {
                "source": queued.source.source,
                "note": queued.source.note,
                "layout": to_data(queued.layout),
            }
            for queued in prepared.queue
        ],
    }


def _print_space(loaded: "Loaded", prepared: "Prepared") -> None:
    """Print what is searched, how many layouts are valid, and how many each rule removed."""
    sweep, space = loaded.sweep, loaded.space
    stdout.print(
        f"{sweep.name}: {sweep.workload.model.name} on {sweep.cluster.world_size} x {sweep.cluster.gpu.name}, "
        f"sequence {sweep.workload.seq_length}, global batch {sweep.workload.global_batch_size}, "
        f"{sweep.workload.precision}",
        markup=False,
    )
    if not sweep.cluster.transformer_engine:
        stdout.print(
            "Transformer Engine is not installed here, so trials run Torch's own layers, which need more memory and "
            "time; the predictions are for these layers"
        )
    stdout.print(f"{len(space.table):,} valid layouts of {space.combinations:,} combinations")
    if prepared.too_large:
        stdout.print(
            f"{prepared.too_large:,} of them are predicted to need more than {sweep.cluster.gpu.memory_gib:g} GiB "
            "and are never launched"
        )
    rules = Table("rule", "removed", title="Rejections by rule", title_justify="left")
    rules.columns[1].justify = "right"
    for rule, count in _rejections(loaded).items():
        rules.add_row(rule, f"{count:,}")
    stdout.print(rules)


def _print_trials(sweep: "Sweep", prepared: "Prepared", parts: list[dict[str, Any]], finals: int) -> None:
    """Print the first trials, the parts of the search, and how many trials follow."""
    queue = prepared.queue
    first = Table("trial", "source", "layout", "why", title="First trials", title_justify="left")
    for number, queued in enumerate(queue[: sweep.budget.trials]):
        source = queued.source
        first.add_row(str(number), source.source, queued.layout.label(), escape(source.note))
    stdout.print(first)
    _print_parts_of_search(parts)
    later = max(0, sum(part["trials"] for part in parts) - len(queue))
    stdout.print(
        f"then up to {later} rows that the sampler picks and {finals} finals; budget {sweep.budget.trials} trials"
    )


def _parts_of_search(sweep: "Sweep", table: "pd.DataFrame", trials: int) -> list[dict[str, Any]]:
    """Return the grid and, if the sweep has one, its refinement as JSON data.

    Each part says which knobs vary, over how many layouts, and in how many trials at most. What the refinement varies
    is estimated around the layouts of the grid that are predicted to be the best.

    Args:
        sweep: the sweep.
        table: the layouts of the grid that may fit.
        trials: how many trials the whole search may use.
    """
    from tuner.predict.feasibility import MIN_FIT
    from tuner.search.grid import GRID_SHARE
    from tuner.search.refinement import predicted_centres, with_refinements
    from tuner.search.variants import variants_of

    if not sweep.refined:
        return [_part_of_search(table, min(trials, len(table)))]
    grid = _part_of_search(table, min(ceil(GRID_SHARE * trials), len(table)))
    centres = predicted_centres(table, sweep.problem)
    added = with_refinements(table, centres, sweep.problem, MIN_FIT).iloc[len(table) :]
    changes = [variants_of(centre, sweep.problem).changes for centre in centres]
    refinement = {
        **_part_of_search(added[list(sweep.refined)], trials - grid["trials"]),
        "around": len(centres),
        "changes": max((count for count in changes if count is not None), default=None),
    }
    return [grid, refinement]


def _part_of_search(rows: "pd.DataFrame", trials: int) -> dict[str, Any]:
    varied = [str(knob) for knob in rows.columns if rows[knob].nunique() > 1]
    return {"knobs": varied, "layouts": len(rows), "trials": trials}


def _print_parts_of_search(parts: list[dict[str, Any]]) -> None:
    if len(parts) < 2:
        return
    grid, refinement = parts
    table = Table("part", "varies", "layouts", "trials", title="Parts of the search", title_justify="left")
    table.add_row("grid", _choices(grid["knobs"]), f"{grid['layouts']:,}", f"up to {grid['trials']}")
    limit = f"; {refinement['changes']} of them at once at most" if refinement["changes"] else ""
    table.add_row(
        "refinement",
        f"around the best {refinement['around']} layouts: {_choices(refinement['knobs'])}{limit}",
        f"{refinement['layouts']:,} around the predicted best",
        f"up to {refinement['trials']}, and what the grid leaves",
    )
    stdout.print(table)


def _choices(knobs: list[str]) -> str:
    """Return the choices that these knobs belong to, each once, separated by commas."""
    return ", ".join(choice for choice, its_knobs in CHOICES.items() if not set(its_knobs).isdisjoint(knobs))
