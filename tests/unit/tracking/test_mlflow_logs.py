"""MLflow keeps the ends of a trial's log files, within bounds."""

from pathlib import Path

from tests.trials import failed_row, write_trial
from tuner.tracking.logs import LOG_TAIL_BYTES, LOG_TOTAL_BYTES, log_tails


def test_logs_are_bounded_and_the_failing_rank_comes_first(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, failed_row(1))
    for rank in range(30):
        path = folder.log / f"attempt_0/{rank}/stderr.log"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"y" * (LOG_TAIL_BYTES + rank))
    tails = log_tails(folder, rank=29)
    assert next(iter(tails)) == "log/attempt_0/29/stderr.log"
    assert sum(len(tail) for tail in tails.values()) == LOG_TOTAL_BYTES
    assert len(tails) < 30


def test_a_tail_is_the_end_of_its_file_and_empty_files_are_left_out(tmp_path: Path) -> None:
    folder = write_trial(tmp_path, failed_row(1))
    (folder.log / "stdout.log").write_bytes(b"start" + b"x" * LOG_TAIL_BYTES + b"end")
    (folder.log / "empty.log").touch()
    tails = log_tails(folder, rank=None)
    assert set(tails) == {"log/stderr.log", "log/stdout.log"}
    assert tails["log/stderr.log"] == b"output of trial 1\n"
    assert len(tails["log/stdout.log"]) == LOG_TAIL_BYTES
    assert tails["log/stdout.log"].endswith(b"xend")
