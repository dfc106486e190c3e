"""megatune plan: what a sweep would try, without starting anything."""

from rich.markup import escape
from rich.table import Table

from tuner.budget import Ledger
from tuner.cli.common import AsJson, SweepPath, load, prepare, print_json, stdout
from tuner.cli.pruned import Pruned, print_pruned, pruned_data
from tuner.files import to_data


def plan(sweep_file: SweepPath, pruned: Pruned = False, json: AsJson = False) -> None:
    """Count the valid layouts, what each rule removed, and list the first trials. Starts no process."""
    from tuner.search.audit import removed

    loaded = load(sweep_file)
    prepared = prepare(loaded, sweep_file)
    gone = removed(loaded.space.table, loaded.sweep.workload, loaded.sweep.cluster) if pruned else None
    sweep, space, table, queue = loaded.sweep, loaded.space, prepared.table, prepared.queue
    rejected = dict(sorted(space.rejected.items(), key=lambda item: -item[1]))
    if json:
        print_json(
            {
                "sweep": sweep.name,
                "combinations": space.combinations,
                "valid": len(space.table),
                "predicted_too_large": prepared.too_large,
                "rejected": {rule: count for rule, count in rejected.items() if count},
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
    kept = Ledger(budget=sweep.budget, world_size=sweep.cluster.world_size, rows=(), lost_s=0.0, clock=None)
    later = max(0, min(sweep.budget.trials - kept.reserve(), len(table)) - len(queue))
    stdout.print(
        f"then up to {later} rows that the sampler picks and {kept.reserve()} finals; "
        f"budget {sweep.budget.trials} trials"
    )
    if gone is not None:
        print_pruned(gone, len(space.table))
