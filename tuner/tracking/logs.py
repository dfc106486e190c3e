"""Reads the part of a trial's log files that is stored in MLflow."""

from pathlib import Path

from tuner.trial.contract import TrialFolder

LOG_TAIL_BYTES = 64 * 1024
"""The most bytes of one log file that are stored in MLflow, from the file's end. Assumed."""

LOG_TOTAL_BYTES = 1024 * 1024
"""The most bytes of all log files of one trial that are stored in MLflow: thousands of ranks write as many files.
Assumed."""


def log_tails(folder: TrialFolder, rank: int | None) -> dict[str, bytes]:
    """Return the end of each log file of a trial, keyed by the file's path relative to the trial's folder.

    Args:
        folder: the trial's folder.
        rank: the rank that failed first, whose files are read first; None if no rank failed.

    Returns:
        At most LOG_TAIL_BYTES per file and LOG_TOTAL_BYTES in all. Empty files are left out, and so are the files that
        remain when LOG_TOTAL_BYTES is reached.
    """
    tails: dict[str, bytes] = {}
    left_bytes = LOG_TOTAL_BYTES
    for path in _by_importance(folder, rank):
        if left_bytes <= 0:
            break
        tail = _tail(path, min(LOG_TAIL_BYTES, left_bytes))
        tails[str(path.relative_to(folder.path))] = tail
        left_bytes -= len(tail)
    return tails


def _by_importance(folder: TrialFolder, rank: int | None) -> list[Path]:
    """Return the log files that are not empty, with those of `rank` first; a rank's files lie in a folder `<rank>/`."""
    paths = [path for path in sorted(folder.log.rglob("*")) if path.is_file() and path.stat().st_size]
    return sorted(paths, key=lambda path: str(rank) not in path.relative_to(folder.log).parts)


def _tail(path: Path, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read(size_bytes)
