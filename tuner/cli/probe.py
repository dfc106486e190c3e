"""megatune probe: what one rank of a layout allocates, without its cluster."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from tuner.cli.common import (
    AsJson,
    Knobs,
    SweepPath,
    detect,
    parse_layout,
    print_json,
    read_recipe,
    refuse_invalid,
    stderr,
    stdout,
)
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import to_data
from tuner.predict.implementation import implementation_of
from tuner.sweep.configuration import Sweep, load_sweep
from tuner.trial.contract import Outcome, RankRecord
from tuner.trial.outcomes import outcome_of_failure

if TYPE_CHECKING:
    from tuner.predict.memory.peak import StageMemory

EVERY_STAGE = "stages"


class Probed(NamedTuple):
    """A rank's record, and what is predicted for its pipeline stage with the layers that it ran."""

    record: RankRecord
    stage: "StageMemory"

    @property
    def difference(self) -> float | None:
        """Relative error of the prediction; None where the rank failed."""
        peak = self.record.peak_allocated_gib
        return None if peak is None else self.stage.total_gib / peak - 1


def probe(
    sweep_file: SweepPath,
    knobs: Knobs,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            help=f"Which rank; '{EVERY_STAGE}' takes the first of each pipeline stage. Without it the rank that is "
            "predicted to need most.",
        ),
    ] = None,
    json: AsJson = False,
) -> int:
    """Run one rank of a layout for two steps without the others, and hold the predicted peak memory against it.

    Needs no cluster: without a GPU no tensor has any memory, and each is accounted. Routing is balanced. Exit code 3
    if a real GPU runs out of memory.
    """
    from launchers.machine.probe import probe as start

    sweep, layout = load_sweep(sweep_file, detect, read_recipe), parse_layout(knobs)
    refuse_invalid(sweep, layout, str(sweep_file))
    from tuner.sweep.loop import trial_spec

    spec = trial_spec(sweep, 0, 1, layout)
    found = []
    for number in _ranks(sweep, layout, rank):
        stderr.print(f"probing rank {number} of {sweep.cluster.world_size}", markup=False)
        found.append(_with_prediction(sweep, layout, start(spec, number)))
    if json:
        print_json({"layout": layout.label(), "ranks": [_data(probed) for probed in found]})
    else:
        stdout.print(f"[bold]{layout.label()}[/]", soft_wrap=True)
        stdout.print(_how(sweep, found), soft_wrap=True)
        stdout.print(_table(found))
    return 3 if any(probed.record.failure for probed in found) else 0


def _ranks(sweep: Sweep, layout: Layout, wanted: str | None) -> list[int]:
    """The ranks to probe.

    Raises:
        InputError: if there is no such rank.
    """
    from tuner.predict.memory.peak import breakdown

    world_size = sweep.cluster.world_size
    each = world_size // layout.pp
    if wanted == EVERY_STAGE:
        return [stage * each for stage in range(layout.pp)]
    if wanted is None:
        stages = breakdown(layout, sweep.workload, sweep.cluster, implementation_of(sweep.cluster))
        return [max(stages, key=lambda stage: stage.total_gib).rank * each]
    if not wanted.isdecimal() or int(wanted) >= world_size:
        raise InputError(f"--rank {wanted}: there are ranks 0 to {world_size - 1}, or '{EVERY_STAGE}'")
    return [int(wanted)]


def _with_prediction(sweep: Sweep, layout: Layout, record: RankRecord) -> Probed:
    """A rank's record beside the prediction for its stage.

    Raises:
        InputError: if Megatron, or this machine, refuses the layout.
    """
    from tuner.predict.memory.peak import breakdown

    failure = record.failure
    if failure is not None:
        outcome, reason = outcome_of_failure(failure.kind, failure.message, record.phase, record.step)
        if outcome is not Outcome.OOM:
            raise InputError(f"{layout.label()}: {reason}")
    on_gpu = failure is not None or record.peak_reserved_gib is not None
    implementation = implementation_of(sweep.cluster) if on_gpu else "torch"
    stages = breakdown(layout, sweep.workload, sweep.cluster, implementation)
    return Probed(record, stages[record.rank // (sweep.cluster.world_size // layout.pp)])


def _how(sweep: Sweep, found: Sequence[Probed]) -> str:
    if any(probed.record.peak_reserved_gib is not None for probed in found):
        return "on this machine's GPU, its allocator's peak; routing balanced"
    if sweep.cluster.device == "cpu":
        return "tensors without memory, each accounted; routing balanced"
    return (
        "no GPU here: plain Torch's layers in the place of Transformer Engine's, for the measurement and for the "
        "prediction; tensors without memory, each accounted; routing balanced"
    )


def _table(found: Sequence[Probed]) -> Table:
    """Measured and predicted peaks in GiB, and what the predicted one is made of, a column a rank."""
    from tuner.predict.memory.peak import PARTS

    table = Table(box=None, pad_edge=False)
    table.add_column("GiB")
    for probed in found:
        table.add_column(f"rank {probed.record.rank}", justify="right")
    digits = 3 if max(probed.stage.total_gib for probed in found) >= 1 else 5
    table.add_row("pipeline stage", *(str(probed.stage.rank) for probed in found))
    table.add_row("[bold]measured peak[/]", *(_measured(probed, digits) for probed in found))
    table.add_row("[bold]predicted peak[/]", *(f"{probed.stage.total_gib:.{digits}f}" for probed in found))
    table.add_row(
        "difference",
        *("" if p.difference is None else f"{p.difference:+.1%}" for p in found),
        end_section=True,
    )
    table.add_row("predicted at", *(probed.stage.moment for probed in found))
    for part in PARTS:
        amounts = [getattr(probed.stage, part) for probed in found]
        if any(amounts):
            table.add_row(
                f"  {part.removesuffix('_gib').replace('_', ' ')}", *(f"{a:.{digits}f}" for a in amounts)
            )
    return table


def _measured(probed: Probed, digits: int) -> str:
    peak = probed.record.peak_allocated_gib
    return "out of memory" if peak is None else f"[bold]{peak:.{digits}f}[/]"


def _data(probed: Probed) -> dict[str, Any]:
    return {
        "rank": probed.record.rank,
        "measured_peak_allocated_gib": probed.record.peak_allocated_gib,
        "measured_peak_reserved_gib": probed.record.peak_reserved_gib,
        "failure": None if probed.record.failure is None else probed.record.failure.message,
        "predicted_peak_gib": probed.stage.total_gib,
        "difference": probed.difference,
        "predicted": to_data(probed.stage),
    }
