"""The part of a trial's log files that MLflow keeps."""

from pathlib import Path

from tuner.trial.contract import TrialFolder

LOG_TAIL_BYTES = 64 * 1024
"""How much of the end of each log file MLflow keeps; the trial's folder keeps the whole file. Assumed."""

LOG_TOTAL_BYTES = 1024 * 1024
"""How much of all log files of a trial MLflow keeps, since thousands of ranks write thousands of files. Assumed."""


def log_tails(folder: TrialFolder, rank: int | None) -> dict[str, bytes]:
    """Return the ends of a trial's log files, by their paths in the trial's folder.

    Args:
        folder: the trial's folder.
        rank: the rank whose files come first, because it failed first; None if no rank failed.

    Returns:
        At most LOG_TAIL_BYTES per file and LOG_TOTAL_BYTES in all; empty files are left out.
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
    """The log files that hold anything, those of `rank` first: its number is a part of their paths."""
    paths = [path for path in sorted(folder.log.rglob("*")) if path.is_file() and path.stat().st_size]
    return sorted(paths, key=lambda path: str(rank) not in path.relative_to(folder.log).parts)


def _tail(path: Path, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read(size_bytes)
