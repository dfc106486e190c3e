"""Kills the tuner again and again: `python -m tests.bench.kill [KILLS=100] [SEED=0] [--slots N]`.

SIGKILL ends the tuner at random moments of a sweep over a deterministic program. After each kill a new tuner continues
in the same folder, until the sweep has ended; then the next sweep begins, until all kills are used. The command prints
counts. It fails unless every table of results equals that of a sweep which was never killed, no result was written
twice, and no process lived more than 5 s longer than its tuner. With several trials in flight (`--slots 2`) a table
depends on which trial ended first: there the number of trials counts, and no layout may be searched twice.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.kills import kill_and_resume


def main(kills: int, seed: int, slots: int = 1) -> int:
    """Print the counts; returns the exit code."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        tally = kill_and_resume(Path(root), kills, seed, slots=slots)
    print(
        f"{tally.kills} kills, each resumed; {tally.sweeps} sweeps of {tally.trials} trials came to their end"
    )
    print(f"tables that differ from the uninterrupted one  {len(tally.differing)}")
    print(f"trials lost                                    {tally.lost}")
    print(f"trials measured twice                          {tally.twice}")
    print(
        f"processes alive 5 s after their tuner's death  {tally.orphans} (the last gone after {tally.slowest_s:.1f} s)"
    )
    print(f"in {time.monotonic() - began_s:.0f} s, seed {seed}, {slots} trials in flight at once")
    for line in tally.differing:
        print(line)
    return 1 if tally.differing or tally.lost or tally.twice or tally.orphans else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill the tuner, and resume.")
    parser.add_argument("kills", nargs="?", type=int, default=100)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--slots", type=int, default=1, help="trials in flight at once")
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed, arguments.slots))
