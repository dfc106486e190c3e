"""The published list of lint's verdicts on every recipe of the installed Megatron Bridge.

`python -m tests.bridge.published_lint results/published/lint/recipes.csv` writes the list, in the environment of
`make test-bridge`.
"""

import csv
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from launchers.machine.recipes import read_recipes
from tests.bridge.configs import write_configs
from tuner.cli.lint import cluster_of
from tuner.frameworks.megatron_bridge.facts import RecipeFacts, RecipeRequest
from tuner.lint.recipes import judge_recipe
from tuner.lint.verdict import RecipeVerdict

COLUMNS = ("recipe", "kind", "gpus", "gpu", "state", "rules", "reason", "layout", "peak_gib", "memory_gib")


def all_recipes() -> tuple[RecipeFacts, ...]:
    """Return what Bridge says of each recipe; nothing is asked of the network."""
    with tempfile.TemporaryDirectory() as folder:
        return read_recipes(RecipeRequest(everything=True, hf_configs=str(write_configs(Path(folder)))))


def judged(facts: RecipeFacts) -> RecipeVerdict:
    """Return lint's verdict on one recipe."""
    cluster, is_known, _ = cluster_of(facts.gpu, max(facts.gpus, 1))
    return judge_recipe(facts, cluster, is_known)


def rows(verdicts: Iterable[RecipeVerdict]) -> list[dict[str, str]]:
    """Return the rows of the list, in the order of the recipes' names."""
    return [_row(verdict) for verdict in sorted(verdicts, key=lambda verdict: verdict.facts.name)]


def _row(recipe: RecipeVerdict) -> dict[str, str]:
    facts, verdict = recipe.facts, recipe.verdict
    refused = recipe.refused or (verdict.refused if verdict else ())
    reasons = [item.message for item in refused] or [recipe.unjudged]
    cluster, *_ = cluster_of(facts.gpu, max(facts.gpus, 1))
    worst = verdict.worst if verdict else None
    return {
        "recipe": facts.name,
        "kind": "perf" if "/perf_recipes/" in facts.file else "library",
        "gpus": str(facts.gpus),
        "gpu": facts.gpu,
        "state": recipe.state,
        "rules": "; ".join(item.rule for item in refused),
        "reason": " | ".join(" ".join(reason.split())[:300] for reason in reasons),
        "layout": verdict.layout.label() if verdict else "",
        "peak_gib": f"{worst.total_gib:.0f}" if worst else "",
        "memory_gib": f"{cluster.gpu.memory_gib:g}" if verdict else "",
    }


def main(path: Path) -> None:
    """Write the list to a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(map(judged, all_recipes())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
