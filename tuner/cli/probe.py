"""megatune probe: measures what one rank of a layout allocates, without the cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tuner.cli.common import AsJson, Knobs, SweepPath, parse_layout, print_json, stderr, stdout
from tuner.cli.planning import read_sweep, refuse_invalid
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.files import to_data
from tuner.predict.implementation import implementation_of
from tuner.sweep.configuration import Sweep
from tuner.trial.contract import Outcome, RankRecord
from tuner.trial.outcomes import outcome_of_failure

if TYPE_CHECKING:
    from tuner.predict.memory.peak import StageMemory

EVERY_STAGE = "stages"
"""The value of `--rank` that probes the first rank of each pipeline stage."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A rank that was probed."""

    record: RankRecord
    """What the rank measured."""
    stage: "StageMemory"
    """The memory predicted for the rank's pipeline stage, with the implementation of the layers that the rank ran."""

    @property
    def difference(self) -> float | None:
        """The relative error of the prediction; None if the rank failed."""
        peak = self.record.peak_allocated_gib
        return None if peak is None else self.stage.total_gib / peak - 1


def probe(
    sweep_file: SweepPath,
    knobs: Knobs,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            help=f"The rank to probe; '{EVERY_STAGE}' takes the first one of each pipeline stage. By default it is the "
            "rank that is predicted to need the most memory.",
        ),
    ] = None,
    json: AsJson = False,
) -> int:
    """Run one rank of a layout for two steps without the other ranks, and compare its peak memory with the prediction.

    No cluster is needed. Without a GPU the tensors have no memory, and their sizes are added up. Tokens are routed
    evenly. Exit code 3 if a real GPU runs out of memory.
    """
    from launchers.machine.probe import probe as start

    sweep, layout = read_sweep(sweep_file), parse_layout(knobs)
    refuse_invalid(sweep, layout, str(sweep_file))
    from tuner.sweep.specs import trial_spec

    spec = trial_spec(sweep, 0, 1, layout)
    ranks = []
    for number in _ranks(sweep, layout, rank):
        stderr.print(f"probing rank {number} of {sweep.cluster.world_size}", markup=False)
        ranks.append(_with_prediction(sweep, layout, start(spec, number)))
    if json:
        print_json({"layout": layout.label(), "ranks": [_data(probed) for probed in ranks]})
    else:
        stdout.print(f"[bold]{layout.label()}[/]", soft_wrap=True)
        stdout.print(_method(sweep, ranks), soft_wrap=True)
        stdout.print(_table(ranks))
    return 3 if any(probed.record.failure for probed in ranks) else 0


def _ranks(sweep: Sweep, layout: Layout, wanted: str | None) -> list[int]:
    """Return the ranks that `--rank` means.

    Raises:
        InputError: if there is no such rank.
    """
    from tuner.predict.memory.peak import memory_breakdown

    world_size = sweep.cluster.world_size
    ranks_per_stage = world_size // layout.pp
    if wanted == EVERY_STAGE:
        return [stage * ranks_per_stage for stage in range(layout.pp)]
    if wanted is None:
        stages = memory_breakdown(layout, sweep.workload, sweep.cluster, implementation_of(sweep.cluster))
        return [max(stages, key=lambda stage: stage.total_gib).rank * ranks_per_stage]
    if not wanted.isdecimal() or int(wanted) >= world_size:
        raise InputError(f"--rank {wanted}: there are ranks 0 to {world_size - 1}, or '{EVERY_STAGE}'")
    return [int(wanted)]


def _with_prediction(sweep: Sweep, layout: Layout, record: RankRecord) -> Probed:
    """Join a rank's record with the prediction for its pipeline stage.

    Raises:
        InputError: if Megatron, or this machine, refuses the layout.
    """
    from tuner.predict.memory.peak import memory_breakdown

    failure = record.failure
    if failure is not None:
        outcome, reason = outcome_of_failure(failure, record.phase, record.step)
        if outcome is not Outcome.OOM:
            raise InputError(f"{layout.label()}: {reason}")
    on_gpu = failure is not None or record.peak_reserved_gib is not None
    implementation = implementation_of(sweep.cluster) if on_gpu else "torch"
    stages = memory_breakdown(layout, sweep.workload, sweep.cluster, implementation)
    return Probed(record, stages[record.rank // (sweep.cluster.world_size // layout.pp)])


def _method(sweep: Sweep, ranks: Sequence[Probed]) -> str:
    """Say how the ranks were measured."""
    if any(probed.record.peak_reserved_gib is not None for probed in ranks):
        return "measured as the peak of the allocator on this machine's GPU; tokens routed evenly"
    if sweep.cluster.device == "cpu":
        return "measured by adding up the sizes of tensors without memory; tokens routed evenly"
    return (
        "measured by adding up the sizes of tensors without memory, since there is no GPU here; measured and predicted "
        "with plain Torch's layers in the place of Transformer Engine's; tokens routed evenly"
    )


def _table(ranks: Sequence[Probed]) -> Table:
    """The measured and predicted peaks in GiB and the parts of the predicted peak, with one column per rank."""
    from tuner.predict.memory.peak import MEMORY_PARTS

    table = Table(box=None, pad_edge=False)
    table.add_column("GiB")
    for probed in ranks:
        table.add_column(f"rank {probed.record.rank}", justify="right")
    digits = 3 if max(probed.stage.total_gib for probed in ranks) >= 1 else 5
    table.add_row("pipeline stage", *(str(probed.stage.rank) for probed in ranks))
    table.add_row("[bold]measured peak[/]", *(_measured(probed, digits) for probed in ranks))
    table.add_row("[bold]predicted peak[/]", *(f"{probed.stage.total_gib:.{digits}f}" for probed in ranks))
    table.add_row(
        "difference",
        *("" if p.difference is None else f"{p.difference:+.1%}" for p in ranks),
        end_section=True,
    )
    table.add_row("predicted at", *(probed.stage.moment for probed in ranks))
    for part in MEMORY_PARTS:
        amounts = [getattr(probed.stage, part) for probed in ranks]
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
