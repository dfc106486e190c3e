"""A program whose result is a formula of its spec: some layouts end badly, and one only at its first attempt.

Run as `torchrun -m tests.integration.programs.formula SPEC FOLDER`. Once its result is written, it adds a line to
`written.jsonl` in the sweep's folder: a trial that is there twice was measured twice.
"""

import os
import sys
import time
from pathlib import Path

from tuner.core.layout import Layout
from tuner.files import append_json_line, read_json, write_json
from tuner.trial.contract import (
    Durations,
    Failure,
    Heartbeat,
    Metrics,
    Outcome,
    Phase,
    RankRecord,
    TrialFolder,
    TrialResult,
    TrialSpec,
)

RANK = int(os.environ.get("RANK", "0"))
TRIAL_S = 0.2
WARMUP, STEPS = 3, 5


def step_time_ms(layout: Layout) -> float:
    """Return a time that differs by layout, so short that every trial costs about as much."""
    recompute = 1.3 if layout.recompute_granularity == "full" else 1.0
    return recompute * (1 + 0.4 * layout.tp + 0.25 * layout.pp + 0.3 / layout.micro_batch_size)


def peak_gib(layout: Layout) -> float:
    """Return a peak that grows with the micro-batch, and shrinks with the model's shards and with recompute."""
    activation_share = 0.25 if layout.recompute_granularity == "full" else 1.0
    return (0.02 + 0.04 * layout.micro_batch_size * activation_share) / (layout.tp * layout.pp)


def failure_of(layout: Layout, attempt: int, memory_gib: float) -> tuple[Phase, int, str, str] | None:
    """Return how a layout fails: phase, steps finished, and the exception's name and text; None if it completes."""
    full = layout.recompute_granularity == "full"
    if peak_gib(layout) > memory_gib:
        return "warmup", 1, "torch.OutOfMemoryError", "out of memory"
    if layout.pp == 2 and layout.micro_batch_size == 1 and not full:
        return "build", 0, "AssertionError", "this layout is refused"
    if layout.micro_batch_size == 2 and full == (layout.pp == 2) and attempt == 1:
        return "forward", 2, "torch.distributed.DistBackendError", "Connection closed by peer"
    if layout.micro_batch_size == 1 and layout.pp == 1 and full:
        return "forward", 2, "NonFiniteLossError", "loss is nan"
    return None


def metrics_of(spec: TrialSpec) -> Metrics:
    """Return the metrics that the trial reports."""
    step_ms = step_time_ms(spec.layout)
    return Metrics(
        step_times_ms=(step_ms,) * STEPS,
        step_time_ms=step_ms,
        step_time_low_ms=step_ms * 0.999,
        step_time_high_ms=step_ms * 1.001,
        losses=tuple(5.0 - step / 10 for step in range(WARMUP + STEPS)),
        grad_norms=(1.0,) * (WARMUP + STEPS),
        tokens_per_s_per_gpu=1e3 * spec.workload.tokens_per_step / step_ms / spec.cluster.world_size,
        model_tflops_per_s_per_gpu=1 / step_ms,
        mfu=None,
        peak_allocated_gib=peak_gib(spec.layout),
        peak_reserved_gib=None,
    )


def main(spec: TrialSpec, folder: TrialFolder) -> int:
    """Run one rank; return the exit code."""

    def beat(phase: Phase, step: int) -> None:
        if RANK == 0:
            write_json(folder.heartbeat, Heartbeat(phase=phase, step=step, time_s=time.time()))

    def record(phase: Phase, step: int, failure: Failure | None = None) -> None:
        folder.ranks.mkdir(exist_ok=True)
        made = RankRecord(rank=RANK, host="here", phase=phase, step=step, failure=failure)
        write_json(folder.rank_record(RANK), made)

    beat("build", 0)
    failed = failure_of(spec.layout, spec.attempt, spec.cluster.gpu.memory_gib)
    if failed is not None:
        phase, step, kind, message = failed
        time.sleep(TRIAL_S / 2)
        record(phase, step, Failure(kind=kind, message=message, traceback="", time_s=time.time()))
        return 1
    for step in range(WARMUP + STEPS):
        beat("warmup" if step < WARMUP else "measure", step)
        time.sleep(TRIAL_S / (WARMUP + STEPS))
    record("teardown", WARMUP + STEPS)
    if RANK == 0:
        result = TrialResult(
            outcome=Outcome.COMPLETED,
            reason="as the formula says",
            metrics=metrics_of(spec),
            durations=Durations(total_s=TRIAL_S),
        )
        write_json(folder.result, result)
        line = {"number": spec.number, "layout": spec.layout.label(), "attempt": spec.attempt}
        append_json_line(folder.path.parents[1] / "written.jsonl", line)
    return 0


if __name__ == "__main__":
    sys.exit(main(read_json(TrialSpec, Path(sys.argv[1])), TrialFolder(Path(sys.argv[2]))))
