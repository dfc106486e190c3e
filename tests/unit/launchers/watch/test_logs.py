"""A job's logs are bounded in size and can be read from their end."""

import os
from pathlib import Path

import pytest

from launchers.watch import logs


def test_logs_within_their_limit_are_left_whole(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"x" * (2 << 20))
    assert logs.bound(tmp_path, 3 << 20) == {}
    assert (tmp_path / "a.log").stat().st_size == 2 << 20


@pytest.mark.parametrize("after_the_cut", [b"", b" and newest"])
def test_a_log_cut_under_its_writer_keeps_the_first_and_the_newest_output(
    after_the_cut: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "rank" / "stdout.log"
    path.parent.mkdir()
    with path.open("wb", buffering=0) as writer:
        writer.write(b"first" + b"x" * (8 << 20) + b"new")
        cut = logs.bound(tmp_path, 4 << 20)
        writer.write(after_the_cut)
        assert path.stat().st_blocks * 512 < 4 << 20
    assert list(cut) == [path]
    logs.close_gap(path, cut[path])
    text = path.read_bytes()
    assert text.startswith(b"firstx") and text.endswith(b"xnew" + after_the_cut)
    assert b"\0" not in text and len(text) < 3 << 20


def test_the_tail_of_a_binary_or_a_missing_file_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"\xff\xfe broken")
    assert logs.tail(tmp_path / "a.log").endswith(" broken")
    assert logs.tail(tmp_path / "missing.log") == ""


def test_a_link_among_the_logs_does_not_cut_the_file_that_it_leads_to(tmp_path: Path) -> None:
    folder, thesis = tmp_path / "log", tmp_path / "thesis.txt"
    folder.mkdir()
    thesis.write_bytes(b"x" * (3 * logs.KEPT_BYTES))
    (folder / "rank0.log").symlink_to(thesis)
    assert logs.bound(folder, 1000) == {}
    assert thesis.stat().st_size == 3 * logs.KEPT_BYTES


def test_a_pipe_in_place_of_a_log_has_no_tail(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rank0.log")
    assert logs.tail(tmp_path / "rank0.log") == ""
    assert logs.bound(tmp_path, 0) == {}
