"""Exports for tests that read the override and not the evidence."""

from tuner.analysis.figures import Figures
from tuner.core.cluster import Cluster
from tuner.core.layout import Layout
from tuner.core.workload import Workload
from tuner.report.export import Format, export
from tuner.trial.contract import Metrics, TrialSpec


def written(
    form: Format, workload: Workload, cluster: Cluster, layout: Layout, recipe: Layout | None = None
) -> str:
    """Return an export with arbitrary measurements."""
    metrics = Metrics(
        step_times_ms=(80.0, 80.0, 80.0),
        step_time_ms=80.0,
        step_time_low_ms=79.0,
        step_time_high_ms=81.0,
        losses=(5.0,),
        grad_norms=(1.0,),
        tokens_per_s_per_gpu=1000.0,
        model_tflops_per_s_per_gpu=500.0,
        mfu=0.5,
        peak_allocated_gib=60.0,
        peak_reserved_gib=61.0,
    )
    facts = Figures(trial=1, metrics=metrics, rival=None, baseline=None, versions={}, device_name="")
    spec = TrialSpec(sweep="night", number=1, workload=workload, cluster=cluster, layout=layout)
    return export(form, spec, facts, "megatune trial results/night 1", recipe_layout=recipe)
