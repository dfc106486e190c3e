"""Peak memory, predicted against measured, and the speed of the prediction: `python -m tests.bench.memory`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from search_spaces.loader import load_cluster, load_model
from tests.bench.space import NODES, peak_rss_mib
from tuner.core.cluster import Cluster
from tuner.core.layout import layout_from
from tuner.core.workload import Model, Workload
from tuner.predict.memory.peak import memory_breakdown, peak_gib
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts

B200 = Path(__file__).parents[3] / "shared" / "data" / "b200_memory.csv"
"""Peaks that the authors of SimuMax measured on 8 B200 (MooreThreads/SimuMax, docs/b200, Apache-2.0)."""
MOST_ROWS = 500_000
"""Most rows of a space that are predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStage:
    """One pipeline stage of a measured run."""

    case: str
    """Name of the run."""
    rank: int
    """Pipeline rank."""
    moment: str
    """Predicted moment of the peak."""
    predicted_gib: float
    """Predicted peak in GiB."""
    measured_gib: float
    """Measured peak of the worst GPU of the stage in GiB."""

    @property
    def error(self) -> float:
        """Return the relative error of the prediction."""
        return self.predicted_gib / self.measured_gib - 1


def measured_models() -> dict[str, Model]:
    """Return the two architectures of the runs by name, cut to the layers that were trained."""
    return {
        "llama3-70b": replace(load_model("llama3-70b"), num_layers=12),
        "deepseekv2": replace(load_model("deepseek-v2"), num_layers=4, moe_layer_freq=(0, 1, 1, 1)),
    }


def b200_stages() -> Iterator[MeasuredStage]:
    """Yield every stage of every run.

    The runs use sequence parallelism if tp > 1, and a capacity factor of 1 balances the load of the experts.
    """
    models, cluster = measured_models(), replace(load_cluster("dgx-b200"), nodes=1)
    for run in pd.read_csv(B200).to_dict("records"):
        model = models[run["model"]]
        assert model.num_layers == run["num_layers"]
        workload = Workload(
            model=model,
            seq_length=run["seq_length"],
            global_batch_size=run["num_microbatches"] * run["micro_batch_size"] * run["dp"],
            moe_router_force_load_balancing=model.is_moe,
        )
        layout = replace(layout_from({str(name): value for name, value in run.items()}), sp=run["tp"] > 1)
        peaks_gib = [float(peak) for peak in run["peak_allocated_gib_by_rank"].split()]
        stage_gpus = len(peaks_gib) // layout.pp
        for stage in memory_breakdown(layout, workload, cluster):
            first_gpu = stage.rank * stage_gpus
            yield MeasuredStage(
                case=run["case"],
                rank=stage.rank,
                moment=stage.moment,
                predicted_gib=stage.total_gib,
                measured_gib=max(peaks_gib[first_gpu : first_gpu + stage_gpus]),
            )


def worst_errors(stages: list[MeasuredStage]) -> dict[str, float]:
    """Return the relative error of the peak of each run's worst rank, by run."""
    runs = {stage.case: [other for other in stages if other.case == stage.case] for stage in stages}
    return {
        case: max(s.predicted_gib for s in of_run) / max(s.measured_gib for s in of_run) - 1
        for case, of_run in runs.items()
    }


def print_b200() -> None:
    """Print the predicted and measured peak of each stage of the B200 runs, and the errors of the runs."""
    if not B200.exists():
        print(f"{B200} is missing: there are no measurements to compare the predictions with")
        return
    stages = list(b200_stages())
    for stage in stages:
        figures = f"predicted {stage.predicted_gib:7.3f} measured {stage.measured_gib:7.3f} GiB"
        print(f"{stage.case:42} stage {stage.rank} {stage.moment:9} {figures} {stage.error:+.2%}")
    errors = np.abs(list(worst_errors(stages).values()))
    print(f"{len(errors)} runs: mean error {errors.mean():.2%}, worst {errors.max():.2%}")


def print_speed(name: str, global_batch_size: int) -> None:
    """Print how many layouts of a model are predicted per second, and how many of them fit."""
    workload = Workload(model=load_model(name), seq_length=4096, global_batch_size=global_batch_size)
    cluster: Cluster = replace(load_cluster("dgx-h100"), nodes=NODES)
    table = enumerate_layouts(workload, cluster, default_domain(workload, cluster)).table
    table = table.sample(min(MOST_ROWS, len(table)), random_state=0)
    before, started = peak_rss_mib(), time.perf_counter()
    peaks = peak_gib(table, workload, cluster)
    wall_s = time.perf_counter() - started
    print(
        f"{name} on {cluster.world_size} GPUs: {len(table):,} layouts in {wall_s:.2f} s, "
        f"{len(table) / wall_s:,.0f} rows/s, peak memory +{peak_rss_mib() - before:.0f} MiB; "
        f"{(peaks <= cluster.gpu.memory_gib).mean():.1%} fit {cluster.gpu.memory_gib:g} GiB"
    )


def main() -> None:
    """Print errors and speed; the targets are errors of 1% on average and 3% at worst, and 200,000 rows/s."""
    print_b200()
    print_speed("llama3-70b", 2048)
    print_speed("deepseek-v3", 15360)


if __name__ == "__main__":
    main()
