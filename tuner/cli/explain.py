"""megatune explain: why a layout is valid or not."""

from rich.markup import escape

from tuner.cli.common import AsJson, Knobs, SweepPath, detect, parse_layout, print_json, stdout
from tuner.layout import data_parallel_size, expert_data_parallel_size, min_gpus, num_microbatches
from tuner.rules import broken_rules
from tuner.sweep_file import load_sweep


def explain(sweep_file: SweepPath, knobs: Knobs, json: AsJson = False) -> int:
    """Name every rule that a layout breaks, and what to change. Exit code 0 if it is valid, 2 if not."""
    sweep, layout = load_sweep(sweep_file, detect), parse_layout(knobs)
    violations = broken_rules(layout, sweep.workload, sweep.cluster, sweep.lifted)
    world = sweep.cluster.world_size
    needed = int(min_gpus(layout.tp, layout.pp, layout.cp, layout.ep, layout.etp))
    dp = data_parallel_size(world, layout.tp, layout.pp, layout.cp)
    derived = {
        "world_size": world,
        "min_gpus": needed,
        "dp": dp,
        "edp": expert_data_parallel_size(world, layout.pp, layout.ep, layout.etp),
        "num_microbatches": num_microbatches(sweep.workload.global_batch_size, layout.micro_batch_size, dp)
        if dp
        else 0,
    }
    if json:
        broken = [
            {"rule": item.rule, "kind": item.kind, "message": item.message, "source": item.source}
            for item in violations
        ]
        print_json({"layout": layout.label(), "valid": not violations, "derived": derived, "broken": broken})
        return 2 if violations else 0
    sizes = ", ".join(f"{name} {value}" for name, value in derived.items())
    stdout.print(f"[bold]{layout.label()}[/]  ({sizes})", soft_wrap=True)
    if not violations:
        stdout.print("[green]valid[/]: breaks no rule")
        return 0
    for item in violations:
        stdout.print(f"[red]{item.rule}[/] [dim]({item.kind})[/]: ", end="")
        stdout.print(f"{escape(item.message)}\n    [dim]source: {escape(item.source)}[/]", soft_wrap=True)
    return 2
