"""megatune plan: what a sweep would try, without starting anything."""

from math import ceil
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tuner.cli.common import AsJson, SweepPath, load, prepare, print_json, stdout
from tuner.cli.pruned import Pruned, print_pruned, pruned_data
from tuner.core.choices import CHOICES
from tuner.files import to_data
from tuner.sweep.budget import Ledger

if TYPE_CHECKING:
    import pandas as pd

    from tuner.cli.common import Prepared
    from tuner.sweep.configuration import Sweep


def plan(sweep_file: SweepPath, pruned: Pruned = False, json: AsJson = False) -> None:
    """Count the valid layouts, what each rule removed, and list the first trials. Starts no process."""
    from tuner.explain.audit import pruned_rows

    loaded = load(sweep_file)
    prepared = prepare(loaded, sweep_file)
    gone = pruned_rows(loaded.space.table, loaded.sweep.workload, loaded.sweep.cluster) if pruned else None
    sweep, space, queue = loaded.sweep, loaded.space, prepared.queue
    rejected = dict(sorted(space.rejected.items(), key=lambda item: -item[1]))
    kept = Ledger(budget=sweep.budget, world_size=sweep.cluster.world_size, rows=(), lost_s=0.0, clock=None)
    stages = _stages(sweep, prepared, sweep.budget.trials - kept.reserve())
    if json:
        print_json(
            {
                "sweep": sweep.name,
                "combinations": space.combinations,
                "valid": len(space.table),
                "predicted_too_large": prepared.too_large,
                "rejected": {rule: count for rule, count in rejected.items() if count},
                "stages": stages,
                "queue": [
                    {"source": origin.source, "note": origin.note, "layout": to_data(layout)}
                    for layout, origin in queue
                ],
                **({} if gone is None else {"pruned": pruned_data(gone)}),
            }
        )
        return
    stdout.print(
        f"{sweep.name}: {sweep.workload.model.name} on {sweep.cluster.world_size} x {sweep.cluster.gpu.name}, "
        f"sequence {sweep.workload.seq_length}, global batch {sweep.workload.global_batch_size}, "
        f"{sweep.workload.precision}",
        markup=False,
    )
    stdout.print(f"{len(space.table):,} valid layouts of {space.combinations:,} combinations")
    if prepared.too_large:
        stdout.print(
            f"{prepared.too_large:,} of them are predicted to need more than {sweep.cluster.gpu.memory_gib:g} GiB "
            "and are never launched"
        )
    rules = Table("rule", "removed", title="Rejections by rule", title_justify="left")
    rules.columns[1].justify = "right"
    for rule, count in rejected.items():
        if count:
            rules.add_row(rule, f"{count:,}")
    stdout.print(rules)
    first = Table("trial", "source", "layout", "why", title="First trials", title_justify="left")
    for number, (layout, origin) in enumerate(queue[: sweep.budget.trials]):
        first.add_row(str(number), origin.source, layout.label(), escape(origin.note))
    stdout.print(first)
    _print_stages(stages)
    later = max(0, sum(stage["trials"] for stage in stages) - len(queue))
    stdout.print(
        f"then up to {later} rows that the sampler picks and {kept.reserve()} finals; "
        f"budget {sweep.budget.trials} trials"
    )
    if gone is not None:
        print_pruned(gone, len(space.table))


def _stages(sweep: "Sweep", prepared: "Prepared", trials: int) -> list[dict[str, Any]]:
    """What varies in each stage of the search, over how many layouts, in how many trials at most; as JSON data."""
    from tuner.predict.feasibility import MIN_FIT
    from tuner.search.grid import GRID_SHARE
    from tuner.search.refinement import predicted_centres, with_refinements
    from tuner.search.variants import variants_of

    table = prepared.table
    if not sweep.refined:
        return [_stage(table, min(trials, len(table)))]
    first = _stage(table, min(ceil(GRID_SHARE * trials), len(table)))
    middles = predicted_centres(table, sweep.problem)
    later = with_refinements(table, middles, sweep.problem, MIN_FIT).iloc[len(table) :]
    second = _stage(later[list(sweep.refined)], trials - first["trials"])
    changes = [variants_of(layout, sweep.problem).changes for layout in middles]
    return [
        first,
        {
            **second,
            "around": len(middles),
            "changes": max((count for count in changes if count is not None), default=None),
        },
    ]


def _stage(rows: "pd.DataFrame", trials: int) -> dict[str, Any]:
    varied = [str(knob) for knob in rows.columns if rows[knob].nunique() > 1]
    return {"knobs": varied, "layouts": len(rows), "trials": trials}


def _print_stages(stages: list[dict[str, Any]]) -> None:
    if len(stages) < 2:
        return
    first, second = stages
    shown = Table("stage", "varies", "layouts", "trials", title="Stages of the search", title_justify="left")
    shown.add_row("1", _choices(first["knobs"]), f"{first['layouts']:,}", f"up to {first['trials']}")
    limit = f"; {second['changes']} of them at once at most" if second["changes"] else ""
    shown.add_row(
        "2",
        f"around the best {second['around']} grids of stage 1: {_choices(second['knobs'])}{limit}",
        f"{second['layouts']:,} around the predicted best",
        f"up to {second['trials']}, and what stage 1 leaves",
    )
    stdout.print(shown)


def _choices(knobs: list[str]) -> str:
    """What varies, each choice once."""
    return ", ".join(choice for choice, own in CHOICES.items() if not set(own).isdisjoint(knobs))
