"""Makes trials for tests: specs, results and folders as a sweep leaves them, with metrics made from one step time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.core.cluster import Cluster, Gpu
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.files import write_json
from tuner.trial.contract import Durations, Measurement, Metrics, Outcome, TrialFolder, TrialResult, TrialSpec
from tuner.trial.finished import FinishedTrial, TrialSource, trial_folder

MODEL = Model(
    name="test-gpt",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=256,
)

PIPELINE = Layout(pp=2)
WORKLOAD = Workload(model=MODEL, seq_length=128, global_batch_size=16, precision="bf16")

CLUSTER = Cluster(
    name="test-cluster",
    device="cuda",
    gpu=Gpu(name="H100", memory_gib=79.1, peak_tflops={"bf16": 989.4}, memory_bandwidth_gb_per_s=3350.0),
    nodes=1,
    gpus_per_node=8,
    nvlink_domain_gpus=8,
    nvlink_bandwidth_gb_per_s=450.0,
    nvlink_latency_us=2.0,
    fabric_bandwidth_gb_per_s=50.0,
    fabric_latency_us=5.0,
)


def spec_of(number: int, layout: Layout, *, sweep: str = "night", cluster: Cluster = CLUSTER) -> TrialSpec:
    return TrialSpec(sweep=sweep, number=number, workload=WORKLOAD, cluster=cluster, layout=layout)


def gloo_trial(steps: int, layout: Layout = PIPELINE, **changes: Any) -> TrialSpec:
    """Return a trial of a few timed steps that two Gloo ranks on any machine can run."""
    gpu = replace(CLUSTER.gpu, name="cpu", memory_gib=1.0, peak_tflops={"fp32": 0.1})
    spec = TrialSpec(
        sweep="night",
        number=0,
        workload=Workload(model=MODEL, seq_length=64, global_batch_size=8, precision="fp32"),
        cluster=replace(CLUSTER, device="cpu", gpu=gpu, gpus_per_node=2, nvlink_domain_gpus=2),
        layout=layout,
        measurement=Measurement(min_steps=steps, max_steps=steps),
    )
    return replace(spec, **changes)


def metrics_of(step_time_ms: float, half_interval_ms: float = 1.0, peak_gib: float = 10.0) -> Metrics:
    tokens_per_s = WORKLOAD.tokens_per_step / (step_time_ms / 1000)
    return Metrics(
        step_times_ms=(
            step_time_ms - 2 * half_interval_ms,
            step_time_ms,
            step_time_ms + 2 * half_interval_ms,
        ),
        step_time_ms=step_time_ms,
        step_time_low_ms=step_time_ms - half_interval_ms,
        step_time_high_ms=step_time_ms + half_interval_ms,
        losses=(5.5, 5.4, 5.3, 5.2, 5.1, 5.0),
        grad_norms=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
        tokens_per_s_per_gpu=tokens_per_s / CLUSTER.world_size,
        model_tflops_per_s_per_gpu=40_000.0 / step_time_ms,
        mfu=40.0 / step_time_ms,
        peak_allocated_gib=peak_gib,
        peak_reserved_gib=peak_gib + 1.5,
    )


def completed_row(
    number: int,
    step_time_ms: float,
    *,
    layout: Layout | None = None,
    source: str = "sampler",
    note: str = "",
    half_interval_ms: float = 1.0,
    peak_gib: float = 10.0,
) -> FinishedTrial:
    result = TrialResult(
        outcome=Outcome.COMPLETED,
        reason="3 steps measured",
        metrics=metrics_of(step_time_ms, half_interval_ms, peak_gib),
        durations=Durations(startup_s=8.0, build_s=1.0, warmup_s=2.0, measure_s=3.0, total_s=15.0),
        versions={"torch": "2.13.0", "megatron-core": "0.16.1"},
        device_name="NVIDIA H100 80GB HBM3",
        finished_at=f"2026-03-01T{2 + number // 60:02d}:{number % 60:02d}:00+00:00",
    )
    return FinishedTrial(
        number=number,
        source=source,
        note=note,
        layout=layout or Layout(micro_batch_size=number + 1),
        precision=WORKLOAD.precision,
        result=result,
    )


def failed_row(
    number: int,
    outcome: Outcome = Outcome.OOM,
    reason: str = "rank 3 ran out of memory",
    *,
    source: str = "sampler",
) -> FinishedTrial:
    result = TrialResult(
        outcome=outcome,
        reason=reason,
        phase="warmup",
        rank=3,
        durations=Durations(startup_s=8.0, total_s=12.0),
        versions={"torch": "2.13.0"},
        finished_at=f"2026-03-01T{2 + number // 60:02d}:{number % 60:02d}:00+00:00",
    )
    return FinishedTrial(
        number=number,
        source=source,
        note="",
        layout=Layout(tp=2, micro_batch_size=number + 1),
        precision=WORKLOAD.precision,
        result=result,
    )


def write_trial(results: Path, row: FinishedTrial) -> TrialFolder:
    """Write a trial's folder as the sweep, the launcher and the program leave it; return it."""
    folder = trial_folder(results, row.number)
    folder.log.mkdir(parents=True, exist_ok=True)
    write_json(folder.source, TrialSource(source=row.source, note=row.note))
    write_json(folder.spec, spec_of(row.number, row.layout))
    write_json(folder.plan, {"argv": ["torchrun", "--nproc-per-node=8"]})
    write_json(folder.result, row.result)
    (folder.log / "stderr.log").write_text(f"output of trial {row.number}\n")
    return folder
