"""megatune explain: why a layout is valid or not, and what a sweep's trials say."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tuner.cli.common import AsJson, parse_layout, print_json, results_folder, stdout
from tuner.cli.planning import read_sweep
from tuner.core.layout import (
    Layout,
    data_parallel_size,
    expert_data_parallel_size,
    min_gpus,
    num_microbatches,
)
from tuner.errors import InputError
from tuner.rules.rule import Violation
from tuner.rules.validity import broken_rules
from tuner.sweep.configuration import Sweep


def explain(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="SWEEP.yaml|RESULTS", help="A sweep file, or a sweep's results folder or its name."
        ),
    ],
    knobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KNOB=VALUE...]", help="The layout: tp=2 pp=4 sp=true ..."),
    ] = None,
    json: AsJson = False,
) -> int:
    """Explain why a layout is valid or not, or what a sweep's trials say.

    With a sweep file and a layout, prints every rule that the layout breaks and what to change; the exit code is 0 if
    the layout is valid and 2 if not. With the results of a sweep, running or finished, prints predictions against
    measurements, which knobs mattered, and the layouts one step from the best. With results and a layout, prints what
    that sweep expects of the layout.
    """
    layout = parse_layout(knobs) if knobs else None
    if not (target if target.exists() else Path("results") / target).is_dir():
        if not target.exists():
            raise InputError(
                f"{target}: there is no such sweep file or results folder (nor {Path('results') / target})"
            )
        if layout is None:
            raise InputError(f"{target} is a sweep file: name the layout to explain, as in tp=2 pp=4")
        return _explain_layout(read_sweep(target), layout, json)

    from tuner.cli.explain_results import explain_prediction, explain_results

    folder = results_folder(target)
    if layout is None:
        explain_results(folder, json)
        return 0
    sweep = folder.sweep()
    if broken_rules(layout, sweep.workload, sweep.cluster, sweep.lifted):
        return _explain_layout(sweep, layout, json)
    explain_prediction(folder, layout, derived_sizes(sweep, layout), json)
    return 0


def _explain_layout(sweep: Sweep, layout: Layout, json: bool) -> int:
    """Print which rules a layout breaks; return the exit code."""
    violations = broken_rules(layout, sweep.workload, sweep.cluster, sweep.lifted)
    derived = derived_sizes(sweep, layout)
    if json:
        print_json(
            {
                "layout": layout.label(),
                "valid": not violations,
                "derived": derived,
                "broken": [_violation_data(violation) for violation in violations],
            }
        )
        return 2 if violations else 0
    print_head(layout, derived)
    if not violations:
        stdout.print("[green]valid[/]: breaks no rule")
        return 0
    for violation in violations:
        source = f"[dim]source: {escape(violation.source)}[/]"
        stdout.print(f"[red]{violation.rule}[/] [dim]({violation.kind})[/]: ", end="")
        stdout.print(f"{escape(violation.message)}\n    {source}", soft_wrap=True)
    return 2


def derived_sizes(sweep: Sweep, layout: Layout) -> dict[str, int]:
    """Return the sizes that follow from a layout; 0 micro-batches if its grid does not fit the number of GPUs."""
    world = sweep.cluster.world_size
    dp = data_parallel_size(world, layout.tp, layout.pp, layout.cp)
    return {
        "world_size": world,
        "min_gpus": int(min_gpus(layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)),
        "dp": dp,
        "edp": expert_data_parallel_size(world, layout.pp, layout.ep, layout.etp),
        "num_microbatches": num_microbatches(sweep.workload.global_batch_size, layout.micro_batch_size, dp)
        if dp
        else 0,
    }


def print_head(layout: Layout, derived: dict[str, int]) -> None:
    """Print a layout's name and its derived sizes."""
    sizes = ", ".join(f"{name} {value}" for name, value in derived.items())
    stdout.print(f"[bold]{layout.label()}[/]  ({sizes})", soft_wrap=True)


def _violation_data(violation: Violation) -> dict[str, Any]:
    return {
        "rule": violation.rule,
        "kind": violation.kind,
        "message": violation.message,
        "source": violation.source,
    }
