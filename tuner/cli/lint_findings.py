"""The output of megatune lint: a finding per job, printed or as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.markup import escape

from tuner.cli.common import stdout
from tuner.core.cluster import Cluster
from tuner.lint.verdict import LIKELY, JobVerdict
from tuner.rules.rule import Violation

COLOURS: Final = {"starts": "green", "refused": "red", "too large": "red", "not judged": "yellow"}
"""The colours of the states of a job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of judging one job."""

    source: str
    """The file or recipe that states the job."""
    cluster: Cluster | None
    """The GPUs that the job was judged for; None if it was not judged."""
    state: str
    """The state of the job: a key of `COLOURS`."""
    verdict: JobVerdict | None
    """The verdict on the job; None if the job's architecture cannot be stated."""
    refused: tuple[Violation, ...]
    unjudged: tuple[str, ...] = ()
    """Arguments that were not judged, or the reason why there is no verdict."""
    notes: tuple[str, ...] = ()


def print_findings(findings: Sequence[Finding]) -> None:
    """Print every finding, and the number of findings per state if there are several."""
    for finding in findings:
        _print(finding)
    if len(findings) > 1:
        states = [finding.state for finding in findings]
        counts = ", ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)
        stdout.print(f"{len(findings)} judged: {counts}", soft_wrap=True)


def _print(finding: Finding) -> None:
    verdict, colour = finding.verdict, COLOURS[finding.state]
    cluster = finding.cluster
    world = f" on {cluster.world_size} x {cluster.gpu.name}" if cluster is not None else ""
    layout = f"  {verdict.layout.label()}" if verdict is not None else ""
    stdout.print(
        f"{escape(finding.source)}: [{colour}]{finding.state}[/]{escape(layout + world)}", soft_wrap=True
    )
    for item in finding.refused:
        stdout.print(f"  [red]{item.rule}[/]: {escape(item.message)}", soft_wrap=True)
        stdout.print(f"    [dim]{escape(item.source)}[/]", soft_wrap=True)
    if verdict is not None and cluster is not None:
        _print_verdict(verdict, cluster)
    for reason in finding.unjudged:
        stdout.print(f"  not judged: {escape(' '.join(reason.split()))}", soft_wrap=True)
    for note in finding.notes:
        stdout.print(f"  note: {escape(note)}", soft_wrap=True)
    for near in verdict.nearest if verdict is not None else ():
        likely = "" if near.fits >= LIKELY else ", too large as well"
        stdout.print(
            f"  near: {escape(near.layout.label())} (fits with probability {near.fits:.0%}{likely})",
            soft_wrap=True,
        )


def _print_verdict(verdict: JobVerdict, cluster: Cluster) -> None:
    if verdict.worst is not None and verdict.fits is not None:
        meaning = (
            f"fits with probability {verdict.fits:.0%}"
            if verdict.memory_counts
            else "an upper bound, see the notes"
        )
        stdout.print(
            f"  peak {verdict.worst.total_gib:.1f} GiB on pipeline stage {verdict.worst.rank}, of "
            f"{cluster.gpu.memory_gib:g} GiB: {meaning}",
            soft_wrap=True,
        )
    for warning in verdict.warnings:
        stdout.print(f"  [yellow]slow[/]: {escape(warning)}", soft_wrap=True)


def finding_data(finding: Finding) -> dict[str, Any]:
    """Return a finding as the data of `lint --json`."""
    verdict, cluster = finding.verdict, finding.cluster
    return {
        "source": finding.source,
        "gpus": None if cluster is None else cluster.world_size,
        "gpu": None if cluster is None else cluster.gpu.name,
        "state": finding.state,
        "layout": None if verdict is None else verdict.layout.label(),
        "starts": finding.state == "starts",
        "refused": [
            {"rule": item.rule, "message": item.message, "source": item.source} for item in finding.refused
        ],
        "warnings": [] if verdict is None else list(verdict.warnings),
        "unjudged": list(finding.unjudged),
        "notes": list(finding.notes),
        "peak_gib": None if verdict is None or verdict.worst is None else verdict.worst.total_gib,
        "memory_gib": None if cluster is None else cluster.gpu.memory_gib,
        "fits": None if verdict is None else verdict.fits,
        "nearest": []
        if verdict is None
        else [{"layout": near.layout.label(), "fits": near.fits} for near in verdict.nearest],
    }
