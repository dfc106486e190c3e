"""megatune lint: says whether training commands and recipes would start, without training."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from search_spaces.loader import load_cluster
from tuner.cli.common import AsJson, print_json
from tuner.cli.lint_findings import Finding, finding_data, print_findings
from tuner.cli.planning import detect, read_recipe
from tuner.core.cluster import Cluster, with_gpus
from tuner.errors import InputError
from tuner.files import read_text, read_yaml_data
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest
from tuner.frameworks.megatron_bridge.saved_config import saved_facts
from tuner.frameworks.megatron_lm.command import read_command
from tuner.lint.judge import judge
from tuner.lint.recipes import judge_recipe
from tuner.lint.verdict import JobVerdict
from tuner.sweep.resolution import ReadRecipe, load_sweep
from tuner.trial.program import BridgeRecipe

REFUSED = 2
"""The exit code if one of the targets would not start, or is not likely to fit."""
EVERYTHING = "bridge"
"""The target that stands for every recipe of the installed Megatron Bridge."""
DEFAULT_CLUSTER = "dgx-h100"
"""The built-in cluster for a target that states no kind of GPU."""

_CLUSTERS = {
    "a100": "dgx-a100-80",
    "h100": "dgx-h100",
    "h200": "dgx-h200",
    "b200": "dgx-b200",
    "b300": "dgx-b300",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
}
"""Built-in clusters by the kind of GPU in a recipe's name."""
_UNPUBLISHED = {"r100": "dgx-b300", "vr200": "gb300-nvl72"}
"""Kinds of GPU without published figures, each with a built-in cluster that has nodes of equal shape."""


def lint(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Shell scripts or files with a Megatron-LM command, sweep files with a baseline, run_config.yaml "
            "files of Megatron Bridge, names of its recipes, Python files with recipes (or FILE.py:FUNCTION), "
            "folders of scripts and YAML files, or `bridge` for every recipe installed.",
        ),
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="The cluster of the job: a built-in one, or a YAML file. Default: the GPUs that a recipe's name "
            f"states, else {DEFAULT_CLUSTER}.",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            help="The number of GPUs. Default: the number in torchrun's arguments, or in the recipe's name.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", help="Tokens of the vocabulary, if only the job could ask the tokenizer."
        ),
    ] = None,
    hf_configs: Annotated[
        Path | None,
        typer.Option(
            "--hf-configs",
            help="Read Hugging Face's config.json of a recipe's model from this folder: MODEL/ID/config.json, or "
            "MODEL--ID_config.json.",
        ),
    ] = None,
    json: AsJson = False,
) -> int:
    """Say what Megatron would refuse and why, and the memory needed. Exit code 2 if a target would not run.

    Scripts, saved configs and folders are read as text, and nothing of them runs. A recipe tells what it trains only
    when it runs: a Python file that you name, or that a sweep file which you name trains, is IMPORTED, and its recipe
    functions are CALLED. Lint only recipes whose authors you trust.
    """
    findings: list[Finding] = []
    for target in targets:
        if _is_recipe(target):
            findings += _recipes(target, cluster, gpus, hf_configs)
        elif Path(target).is_dir():
            findings += _folder(Path(target), cluster, gpus, vocab_size)
        else:
            findings.append(_file(Path(target), cluster, gpus, vocab_size))
    if json:
        print_json([finding_data(finding) for finding in findings])
    else:
        print_findings(findings)
    return REFUSED if any(finding.state in {"refused", "too large"} for finding in findings) else 0


def _is_recipe(target: str) -> bool:
    """Return whether a target stands for recipes that are imported: a Python file, a recipe's name, or Bridge's own."""
    path = Path(target.partition(":")[0])
    if path.is_dir():
        from launchers.machine.recipes import bridge_folder

        bridge = bridge_folder()
        return bridge is not None and path.resolve().is_relative_to(bridge)
    return path.suffix == ".py" or (not path.exists() and target.isidentifier())


def _recipes(target: str, cluster: str | None, gpus: int | None, hf_configs: Path | None) -> list[Finding]:
    from launchers.machine.recipes import read_recipes

    name, _, function = target.partition(":")
    path = Path(name)
    is_path = path.suffix == ".py" or path.is_dir()
    request = RecipeRequest(
        function=function or None,
        names=() if is_path or target == EVERYTHING else (target,),
        paths=(str(path.absolute()),) if is_path else (),
        everything=target == EVERYTHING and not is_path,
        gpus=gpus,
        hf_configs=None if hf_configs is None else str(hf_configs.absolute()),
    )
    return [
        _recipe(facts, f"{_shown(facts.file)}:{facts.name}" if is_path else facts.name, cluster)
        for facts in read_recipes(request)
    ]


def _shown(file: str) -> str:
    """Return the path of a file, relative to the working directory if the file lies in it."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def _recipe(facts: RecipeFacts, source: str, cluster_name: str | None) -> Finding:
    """Judge a recipe on a named cluster; without a name, on the GPUs that it was resolved for."""
    world = max(facts.gpus, 1)
    if cluster_name is not None:
        cluster, is_known, note = with_gpus(load_cluster(cluster_name), world), True, ""
    else:
        cluster, is_known, note = cluster_of(facts.gpu, world)
    judged = judge_recipe(facts, cluster, is_known)
    return Finding(
        source=source,
        cluster=cluster,
        state=judged.state,
        verdict=judged.verdict,
        refused=judged.refused or (judged.verdict.refused if judged.verdict else ()),
        unjudged=(judged.unjudged,) if judged.unjudged else (),
        notes=(*judged.notes, *([note] if note else [])),
    )


def cluster_of(gpu: str, gpus: int) -> tuple[Cluster, bool, str]:
    """Return a cluster of GPUs of a kind, whether their memory is known, and a note for the reader if it is not.

    Args:
        gpu: The kind of GPU, such as h100.
        gpus: The number of GPUs.
    """
    if gpu in _CLUSTERS:
        return with_gpus(load_cluster(_CLUSTERS[gpu]), gpus), True, ""
    similar = with_gpus(load_cluster(_UNPUBLISHED.get(gpu, DEFAULT_CLUSTER)), gpus)
    renamed = replace(similar, gpu=replace(similar.gpu, name=f"NVIDIA {gpu.upper()}"))
    note = f"{gpu}: its memory is not known here; the memory is compared with {similar.gpu.name}'s"
    return renamed, False, note


def _folder(folder: Path, cluster: str | None, gpus: int | None, vocab_size: int | None) -> Iterator[Finding]:
    """Yield a finding for each script, YAML file and file of recipes in a folder; hidden folders are left out.

    All of them are read as text: nobody named them, so none is imported, and no mistake in one hides the others.
    """
    for name, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for path in (Path(name, file) for file in sorted(files)):
            try:
                if path.suffix in {".sh", ".yaml", ".yml"}:
                    yield _file(path, cluster, gpus, vocab_size, refuse_recipe)
                elif path.suffix == ".py" and "megatron.bridge" in read_text(path):
                    yield _unjudged(
                        path, "it may hold recipes: name the file itself to import it and call them"
                    )
            except InputError as error:
                yield _unjudged(path, str(error).removeprefix(f"{path}: "))


def refuse_recipe(program: BridgeRecipe, cluster: Cluster) -> RecipeFacts:
    """Refuse a recipe that a sweep file in a folder trains, in place of `read_recipe`."""
    raise InputError("it trains a recipe: name the file itself to import the recipe and call it")


def _unjudged(path: Path, reason: str) -> Finding:
    return Finding(
        source=str(path), cluster=None, state="not judged", verdict=None, refused=(), unjudged=(reason,)
    )


def _file(
    path: Path,
    cluster: str | None,
    gpus: int | None,
    vocab_size: int | None,
    recipe_reader: ReadRecipe = read_recipe,
) -> Finding:
    if path.suffix in {".yaml", ".yml"}:
        saved = saved_facts(read_yaml_data(path), path.stem, gpus)
        if saved is not None:
            return _recipe(saved, str(path), cluster or DEFAULT_CLUSTER)
        sweep = load_sweep(path, detect, recipe_reader)
        if sweep.baseline is None:
            raise InputError(f"{path}: states no baseline, so there is no layout to judge")
        is_resolved = isinstance(sweep.program, BridgeRecipe)
        verdict = judge(
            sweep.baseline, sweep.workload, sweep.cluster, is_resolved=is_resolved, lifted=sweep.lifted
        )
        return _finding(path, sweep.cluster, verdict)
    command = read_command(read_text(path), str(path), gpus, vocab_size)
    gpus_of_command = with_gpus(load_cluster(cluster or DEFAULT_CLUSTER), command.world_size)
    verdict = judge(command.layout, command.workload, gpus_of_command)
    return _finding(path, gpus_of_command, verdict, command.unjudged)


def _finding(path: Path, cluster: Cluster, verdict: JobVerdict, unjudged: tuple[str, ...] = ()) -> Finding:
    return Finding(
        source=str(path),
        cluster=cluster,
        state="starts" if verdict.starts else "refused" if verdict.refused else "too large",
        verdict=verdict,
        refused=verdict.refused,
        unjudged=unjudged,
    )
