"""megatune plan: what a sweep would try, without starting anything."""

from rich.markup import escape
from rich.table import Table

from tuner.cli.common import AsJson, SweepPath, check_baseline, check_not_empty, load, print_json, stdout
from tuner.files import to_data
from tuner.heuristics import seeds


def plan(sweep_file: SweepPath, json: AsJson = False) -> None:
    """Count the valid layouts, what each rule removed, and list the first trials. Starts no process."""
    from tuner.sweep import queue_of, with_row

    loaded = load(sweep_file)
    check_not_empty(loaded, sweep_file)
    sweep, space = loaded.sweep, loaded.space
    check_baseline(sweep, sweep_file)
    table = space.table if sweep.baseline is None else with_row(space.table, sweep.baseline)
    queue = queue_of(sweep.baseline, seeds(sweep.workload, sweep.cluster, table))
    rejected = dict(sorted(space.rejected.items(), key=lambda item: -item[1]))
    if json:
        print_json(
            {
                "sweep": sweep.name,
                "combinations": space.combinations,
                "valid": len(space.table),
                "rejected": {rule: count for rule, count in rejected.items() if count},
                "queue": [
                    {"source": origin.source, "note": origin.note, "layout": to_data(layout)}
                    for layout, origin in queue
                ],
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
    later = max(0, min(sweep.budget.trials, len(table)) - len(queue))
    stdout.print(f"then up to {later} rows that the sampler picks; budget {sweep.budget.trials} trials")
