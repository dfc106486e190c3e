"""Injects faults into trials and checks their outcomes: `python -m tests.bench.faults [cold] [forked] [FAULT...]`.

Every fault is injected into a real torchrun job of two ranks, started cold or forked. A trial that must complete
follows each faulty one. Without arguments, the deaths of tuners follow (tests/orphans.py), then the bad nights of whole
sweeps (tests/bad_nights.py), and the tuner is killed a hundred times (tests/bench/kill.py). The exit code is 1 if any
outcome is wrong.
"""

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launchers.local.fork_client import Preload
from launchers.local.torchrun import TorchrunLauncher
from launchers.processes import marked_processes
from tests.bad_nights import BAD_NIGHTS, live_through
from tests.bench import kill
from tests.disks import small_disk
from tests.faults import FAULTS, Fault, Programs, lost, spec_for, wrong
from tests.orphans import DEATHS, ORPHANS_S, PROGRAMS, kill_tuner
from tuner.trial.contract import Outcome, TrialFolder

LOG_LIMIT_MIB = 64
"""The most that the logs of a trial may hold. Assumed."""

GRACE_S = 2.0
"""How long a job may take to end after SIGTERM. Assumed."""

KILLS = 100
"""How often the tuner is killed."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one injected fault: a row of the printed table."""

    fault: Fault
    start: str
    """`cold` or `forked`."""
    injected: bool
    """False if this machine cannot inject the fault."""
    wrong: str = ""
    """What is wrong with the outcome; empty if nothing is."""
    ended_s: float = 0.0
    """How long the trial took."""
    log_mib: float = 0.0
    """The size of the trial's logs."""
    lost: tuple[str, ...] = ()
    """The evidence that is missing from the trial's folder."""
    orphans: int = 0
    """How many processes of the trial were alive after its end."""
    next_trial: str = "ok"
    """The reason why the following trial did not complete; `ok` if it did."""

    def passed(self) -> bool:
        """Whether everything is right; a fault that this machine cannot inject passes."""
        in_time = self.ended_s <= self.fault.within_s and self.log_mib <= LOG_LIMIT_MIB
        return not (self.wrong or self.lost or self.orphans) and in_time and self.next_trial == "ok"

    def cells(self) -> tuple[str, ...]:
        """The cells of the row in the printed table."""
        name = (self.fault.program, self.start, self.fault.outcome.value)
        if not self.injected:
            return (*name, "not injected: no disk can be mounted here", *[""] * 6)
        return (
            *name,
            "yes",
            "no" if self.wrong else "yes",
            f"{self.ended_s:.1f} of {self.fault.within_s:g}",
            f"{self.log_mib:.2f}",
            ", ".join(self.lost) or "nothing",
            str(self.orphans),
            self.next_trial,
        )


TITLES = (
    "fault", "start", "to be reported as", "injected", "classified right", "ended within s", "log MiB", "lost",
    "orphans", "next trial",
)  # fmt: skip


def try_fault(fault: Fault, start: str, launcher: TorchrunLauncher, root: Path) -> Row:
    """Run a trial with the fault and then one without, and look at what is left of the first one."""
    folder = TrialFolder(root / f"{start} {fault.program}")
    folder.path.mkdir()
    row = Row(fault, start, injected=True)
    with ExitStack() as stack:
        if fault.needs_small_disk:
            try:
                stack.enter_context(small_disk(folder.path))
            except pytest.skip.Exception:
                return replace(row, injected=False)
        result = launcher.run(launcher.plan(fault.spec(), folder), threading.Event())
        row = replace(
            row,
            wrong=wrong(fault, result),
            ended_s=result.durations.total_s,
            log_mib=sum(path.stat().st_size for path in folder.log.rglob("*.log")) / 2**20,
            lost=tuple(lost(folder, result)),
            orphans=len(marked_processes(str(folder.path))),
        )
    after = TrialFolder(root / f"{start} after {fault.program}")
    following = launcher.run(launcher.plan(spec_for("completes"), after), threading.Event())
    if following.outcome is not Outcome.COMPLETED:
        row = replace(row, next_trial=following.reason)
    shutil.rmtree(folder.path)
    return row


def try_all(faults: Sequence[Fault], starts: Sequence[str], root: Path) -> Iterator[Row]:
    """Try every fault with each way of starting a job, one after the other."""
    with Preload(root) as preload:
        cold = TorchrunLauncher(programs=Programs(), grace_s=GRACE_S)
        launchers = {"cold": cold, "forked": replace(cold, start=preload.start)}
        for start in starts:
            for fault in faults:
                yield try_fault(fault, start, launchers[start], root)


def try_deaths() -> int:
    """Print how soon a trial ends after its tuner, for each death and program; return the number of failures."""
    _print_titles(
        "tuner gets",
        "program",
        "processes",
        f"alive {ORPHANS_S:g} s after its death",
        "the last gone after s",
    )
    failures = 0
    for number in DEATHS:
        for program in PROGRAMS:
            with tempfile.TemporaryDirectory() as folder:
                left = kill_tuner(program, number, Path(folder))
            failures += left.orphans > 0
            cells = (number.name, program, str(left.began), str(left.orphans), f"{left.outlived_s:.1f}")
            print(line(cells), flush=True)
    return failures


def try_nights() -> int:
    """Print how a sweep comes through each bad night; return the number of failures."""
    _print_titles("fault", "exit code", "trials kept", "changed", "orphans", "resumed", "as it has to be")
    failures = 0
    for night in BAD_NIGHTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                morning = live_through(night, Path(folder))
            except pytest.skip.Exception:
                print(line((night.name, "not injected: no disk can be mounted here", *[""] * 5)), flush=True)
                continue
        wrong_text = morning.wrong(night)
        failures += bool(wrong_text)
        numbers = (morning.exit_code, morning.kept, morning.changed, morning.orphans)
        resumed = f"exit code {morning.resumed_exit_code}, {morning.finished} trials"
        print(line((night.name, *map(str, numbers), resumed, wrong_text or "yes")), flush=True)
    return failures


def _print_titles(*titles: str) -> None:
    print("", line(titles), line("---" for _ in titles), sep="\n", flush=True)


def line(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Print the table as it grows; returns 1 if a row is wrong."""
    # On SIGTERM the context managers still end the running job and remove the small disk.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    starts = [start for start in ("cold", "forked") if start in arguments] or ["cold", "forked"]
    named = set(arguments) - {"cold", "forked"}
    if unknown := named - {fault.program for fault in FAULTS}:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(fault.program for fault in FAULTS)}")
        return 2
    faults = [fault for fault in FAULTS if not named or fault.program in named]
    print(line(TITLES), line("---" for _ in TITLES), sep="\n", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in try_all(faults, starts, Path(folder)):
            rows.append(row)
            print(line(row.cells()), flush=True)
    failed = [row for row in rows if not row.passed()]
    for row in failed:
        print(f"{row.start} {row.fault.program}: {row.wrong or 'see the table'}")
    print(f"{len(rows) - len(failed)} of {len(rows)} as they have to be", flush=True)
    if arguments:
        return 1 if failed else 0
    failures = len(failed) + try_deaths() + try_nights()
    return 1 if failures else kill.main(KILLS, seed=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
