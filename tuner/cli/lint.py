"""megatune lint: whether a training command would start, in a second, without running it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from search_spaces.loader import load_cluster
from tuner.cli.common import AsJson, detect, print_json, stdout
from tuner.cluster import Cluster
from tuner.errors import InputError
from tuner.layout import Layout
from tuner.lint import LIKELY, Verdict, judge
from tuner.megatron_lm import read_command
from tuner.sweep_file import load_sweep
from tuner.workload import Workload

REFUSED = 2
"""The exit code where any of the targets would not start, or is not likely to fit."""


def lint(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Shell scripts or files with a Megatron-LM command, or sweep files with a baseline.",
        ),
    ],
    cluster: Annotated[
        str, typer.Option("--cluster", help="What a command is to run on: a built-in cluster or its YAML.")
    ] = "dgx-h100",
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="How many GPUs; default: what the command gives torchrun.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Where only the run could ask the tokenizer.")
    ] = None,
    json: AsJson = False,
) -> int:
    """Say what Megatron would refuse and why, the memory needed, what lies near. Exit code 2 if one would not run."""
    jobs = [_read(path, cluster, gpus, vocab_size) for path in targets]
    verdicts = [judge(job.layout, job.workload, job.cluster) for job in jobs]
    if json:
        print_json([_data(job, verdict) for job, verdict in zip(jobs, verdicts, strict=True)])
    else:
        for job, verdict in zip(jobs, verdicts, strict=True):
            _print(job, verdict)
    return 0 if all(verdict.starts for verdict in verdicts) else REFUSED


@dataclass(frozen=True, slots=True)
class _Job:
    source: Path
    workload: Workload
    cluster: Cluster
    layout: Layout
    unjudged: tuple[str, ...] = ()


def _read(path: Path, cluster: str, gpus: int | None, vocab_size: int | None) -> _Job:
    if path.suffix in {".yaml", ".yml"}:
        sweep = load_sweep(path, detect)
        if sweep.baseline is None:
            raise InputError(f"{path}: states no baseline, so there is no layout to judge")
        return _Job(path, sweep.workload, sweep.cluster, sweep.baseline)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    command = read_command(text, str(path), gpus, vocab_size)
    whole = _with_gpus(load_cluster(cluster), command.world_size)
    return _Job(path, command.workload, whole, command.layout, command.unjudged)


def _with_gpus(cluster: Cluster, gpus: int) -> Cluster:
    """The cluster with so many GPUs: whole nodes, or a part of one."""
    each = min(gpus, cluster.gpus_per_node)
    if gpus % each:
        raise InputError(
            f"{gpus} GPUs are no whole nodes of {cluster.name}, {cluster.gpus_per_node} GPUs each"
        )
    domain = cluster.nvlink_domain_gpus if gpus >= cluster.nvlink_domain_gpus else each
    return replace(cluster, nodes=gpus // each, gpus_per_node=each, nvlink_domain_gpus=domain)


def _print(job: _Job, verdict: Verdict) -> None:
    state = (
        "[green]starts[/]"
        if verdict.starts
        else "[red]refused[/]"
        if verdict.refused
        else "[red]too large[/]"
    )
    world = f"{job.cluster.world_size} GPUs of {job.cluster.name}"
    stdout.print(f"{escape(str(job.source))}: {state}  {verdict.layout.label()} on {world}", soft_wrap=True)
    for item in verdict.refused:
        stdout.print(f"  [red]{item.rule}[/]: {escape(item.message)}", soft_wrap=True)
        stdout.print(f"    [dim]{escape(item.source)}[/]", soft_wrap=True)
    if verdict.worst is not None and verdict.fits is not None:
        stdout.print(
            f"  peak {verdict.worst.total_gib:.1f} GiB on pipeline stage {verdict.worst.rank}, of "
            f"{job.cluster.gpu.memory_gib:g} GiB: fits with probability {verdict.fits:.0%}",
            soft_wrap=True,
        )
    for warning in verdict.warnings:
        stdout.print(f"  [yellow]slow[/]: {escape(warning)}", soft_wrap=True)
    if job.unjudged:
        stdout.print(f"  not judged: {escape(', '.join(job.unjudged))}", soft_wrap=True)
    for near in verdict.nearest:
        likely = "" if near.fits >= LIKELY else ", too large as well"
        stdout.print(
            f"  near: {near.layout.label()} (fits with probability {near.fits:.0%}{likely})", soft_wrap=True
        )


def _data(job: _Job, verdict: Verdict) -> dict[str, Any]:
    return {
        "source": str(job.source),
        "gpus": job.cluster.world_size,
        "layout": verdict.layout.label(),
        "starts": verdict.starts,
        "refused": [
            {"rule": item.rule, "message": item.message, "source": item.source} for item in verdict.refused
        ],
        "warnings": list(verdict.warnings),
        "unjudged": list(job.unjudged),
        "peak_gib": None if verdict.worst is None else verdict.worst.total_gib,
        "memory_gib": job.cluster.gpu.memory_gib,
        "fits": verdict.fits,
        "nearest": [{"layout": near.layout.label(), "fits": near.fits} for near in verdict.nearest],
    }
