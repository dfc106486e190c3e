"""Writes lines for the terminal that say what a sweep is doing now."""

from tuner.report.durations import duration
from tuner.sweep.lock import Holder
from tuner.sweep.status import Status


def status_lines(status: Status, holder: Holder | None) -> list[str]:
    """Return lines that say what the tuner of a sweep is doing, how far the sweep is, and when it will end.

    If no tuner runs the sweep, the result is a line that says that the last tuner was killed, or no line if the last
    tuner ended by itself.

    Args:
        status: The content of the sweep's status file.
        holder: The tuner process that runs the sweep; None if there is none.
    """
    if holder is None:
        if status.ended is not None:
            return []
        return [
            f"No tuner runs this sweep now; the last one was killed after {status.updated_at}. "
            "The same `megatune sweep` command goes on."
        ]
    lines = [f"This sweep runs now ({holder}), {status.halt}; as of {status.updated_at}:"]
    for trial in status.running:
        attempt = f", attempt {trial.attempt}" if trial.attempt > 1 else ""
        lines.append(
            f"  trial {trial.number} [{trial.source}] {trial.label}: {trial.phase}, step {trial.step}"
            f"{attempt}, since {trial.began_at}"
        )
    lines.append(f"  {_standing(status)}")
    return lines


def _standing(status: Status) -> str:
    parts = [f"{status.finished}/{status.budget} trials"]
    if status.part is not None:
        parts.append(f"searching the {status.part}")
    if status.best is not None:
        best = status.best
        parts.append(f"best {best.step_time_ms:,.1f} ms (trial {best.number}: {best.label})")
    if status.certainty is not None:
        certainty = status.certainty
        parts.append(
            f"{certainty.probability:.0%} sure to be within {certainty.within:.0%} of the best of {certainty.of}"
        )
    parts.append(f"{duration(status.used_s)} and {status.used_gpu_hours:.2f} GPU-hours used")
    if status.left_s is not None:
        parts.append(f"{duration(status.left_s)} left")
    if status.deadline_at is not None:
        parts.append(f"to end by {status.deadline_at}")
    return " | ".join(parts)
