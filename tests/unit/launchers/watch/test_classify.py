"""Every way in which a trial can end is recognised from its evidence."""

from dataclasses import replace
from pathlib import Path

import pytest

from launchers.watch.classify import classify
from launchers.watch.evidence import JobEvidence
from launchers.watch.limits import Ending
from launchers.watch.log_text import failed_ranks
from tests.failure_texts import FAILURE_TEXTS, FailureText
from tests.trials import metrics_of
from tuner.trial.contract import Failure, Heartbeat, Limits, Outcome, Phase, RankRecord, TrialResult

ENDED = JobEvidence(limits=Limits(), exit_code=1, heartbeat=Heartbeat(phase="measure", step=4, time_s=100.0))
COMPLETED = TrialResult(outcome=Outcome.COMPLETED, reason="measured", metrics=metrics_of(100.0))

# As torchrun of torch 2.13 printed it for a rank killed by SIGKILL.
REPORT = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
p.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-23_00:43:32
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 6268)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 6268
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_00:43:32
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 6269)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 6269
============================================================
"""


def failed(
    rank: int, kind: str, message: str, time_s: float, phase: Phase = "measure", step: int = 4
) -> RankRecord:
    failure = Failure(kind=kind, message=message, traceback="", time_s=time_s)
    return RankRecord(rank=rank, host="node1", phase=phase, step=step, failure=failure)


def summary(row: FailureText) -> str:
    return f"{row.outcome}: {row.text[:60]}"


OOM = failed(1, "torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", 50.0)
PEER = failed(0, "torch.distributed.DistBackendError", "Connection closed by peer [10.0.0.2]:29500", 51.0)


def test_the_report_gives_the_exit_codes_with_the_root_cause_first() -> None:
    assert list(failed_ranks(REPORT).items()) == [(1, -9), (0, -15)]
    assert failed_ranks("torchrun died without a word") == {}


def test_a_result_counts_only_if_every_rank_ended_well() -> None:
    assert classify(replace(ENDED, exit_code=0, result=COMPLETED)).outcome is Outcome.COMPLETED
    judgement = classify(replace(ENDED, exit_code=1, result=COMPLETED, exit_codes={1: 3}))
    assert (judgement.outcome, judgement.rank) == (Outcome.INFRASTRUCTURE, 1)


def test_a_result_that_the_program_decided_itself_stands() -> None:
    slow = TrialResult(outcome=Outcome.TOO_SLOW, reason="cannot beat 100 ms", phase="measure")
    assert classify(replace(ENDED, exit_code=0, result=slow)).outcome is Outcome.TOO_SLOW
    nan = TrialResult(outcome=Outcome.NAN, reason="loss is nan", phase="warmup", rank=0)
    assert classify(replace(ENDED, result=nan)).outcome is Outcome.NAN


@pytest.mark.parametrize("records", [(PEER, OOM), (OOM, PEER)])
def test_a_lost_connection_is_the_consequence_of_another_failure(
    records: tuple[RankRecord, ...],
) -> None:
    judgement = classify(replace(ENDED, records=records))
    assert (judgement.outcome, judgement.rank, judgement.phase) == (Outcome.OOM, 1, "measure")


def test_a_lost_connection_is_the_consequence_even_where_its_clock_is_early() -> None:
    early = failed(0, "torch.distributed.DistBackendError", "Connection reset by peer", 49.0)
    assert classify(replace(ENDED, records=(early, OOM))).rank == 1


def test_the_earliest_of_several_failures_is_the_cause() -> None:
    later = failed(0, "RuntimeError", "shape mismatch", 60.0, step=0)
    assert classify(replace(ENDED, records=(later, OOM))).outcome is Outcome.OOM


def test_a_lost_connection_alone_is_communication() -> None:
    judgement = classify(replace(ENDED, records=(PEER,)))
    assert (judgement.outcome, judgement.rank) == (Outcome.COMMUNICATION, 0)


def test_a_failure_after_the_launcher_ended_the_job_is_its_consequence() -> None:
    after = replace(ENDED, records=(PEER,), ended_at_s=50.5)
    assert classify(replace(after, ending="stop")).outcome is Outcome.INTERRUPTED
    assert classify(replace(after, ending="step")).outcome is Outcome.HANG


def test_a_failure_before_the_launcher_ended_the_job_is_the_cause() -> None:
    assert classify(replace(ENDED, records=(OOM,), ending="step", ended_at_s=90.0)).outcome is Outcome.OOM


@pytest.mark.parametrize(
    ("ending", "outcome", "word"),
    [
        ("stop", Outcome.INTERRUPTED, "on request"),
        ("startup", Outcome.HANG, "600 s (limits.startup_s)"),
        ("step", Outcome.HANG, "300 s (limits.step_s) after step 4"),
        ("trial", Outcome.TIMEOUT, "1800 s (limits.trial_s)"),
    ],
)
def test_a_job_that_the_launcher_ended_is_judged_by_the_reason(
    ending: Ending, outcome: Outcome, word: str
) -> None:
    evidence = replace(ENDED, ending=ending, exit_code=-15, exit_codes={0: -15, 1: -15})
    judgement = classify(evidence)
    assert (judgement.outcome, judgement.phase) == (outcome, "measure")
    assert word in judgement.reason


@pytest.mark.parametrize("row", [row for row in FAILURE_TEXTS if row.outcome is Outcome.OOM], ids=summary)
def test_every_allocators_text_in_a_log_is_out_of_memory(row: FailureText) -> None:
    tails = {0: "all fine\n", 1: f"step 4\n{row.printed}bye\n"}
    judgement = classify(replace(ENDED, exit_codes={1: 1}, tails=tails, records=(PEER,)))
    assert (judgement.outcome, judgement.rank) == (Outcome.OOM, 1)
    assert judgement.reason in " ".join(row.printed.split())


@pytest.mark.parametrize("row", FAILURE_TEXTS, ids=summary)
def test_what_a_rank_prints_means_what_its_record_would(row: FailureText) -> None:
    record = RankRecord(rank=1, host="node1", phase="startup", step=0, failure=row.failure)
    starting = replace(ENDED, heartbeat=None, exit_codes={1: 1})
    assert classify(replace(starting, records=(record,))).outcome is row.outcome
    assert classify(replace(starting, tails={1: row.failure.traceback})).outcome is row.outcome


def test_a_warning_of_a_missing_driver_is_no_broken_machine() -> None:
    warning = "UserWarning: CUDA initialization: Found no NVIDIA driver on your system.\n"
    lost = "RuntimeError: Connection closed by peer [127.0.0.1]:4242\n"
    judgement = classify(replace(ENDED, exit_codes={1: 1}, tails={1: warning + lost}))
    assert judgement.outcome is Outcome.COMMUNICATION


def test_a_kill_by_the_kernel_is_out_of_memory_and_another_is_not() -> None:
    killed = replace(ENDED, exit_codes=failed_ranks(REPORT), records=(PEER,))
    assert classify(replace(killed, host_oom_kills=1)).outcome is Outcome.OOM
    judgement = classify(killed)
    assert (judgement.outcome, judgement.rank) == (Outcome.INFRASTRUCTURE, 1)
    assert "SIGKILL, which megatune did not send" in judgement.reason


@pytest.mark.parametrize("other", [-9, -15, 1])
def test_how_torchrun_ends_the_other_ranks_does_not_count(other: int) -> None:
    nan = TrialResult(outcome=Outcome.NAN, reason="loss is nan", phase="warmup", rank=0)
    ended = replace(ENDED, exit_codes={0: 1, 1: other}, host_oom_kills=1)
    assert classify(replace(ended, result=nan)).outcome is Outcome.NAN
    judgement = classify(ended)
    assert (judgement.outcome, judgement.rank) == (Outcome.INFRASTRUCTURE, 0)
    assert "rank 0 ended with exit code 1" in judgement.reason


def test_a_signal_of_the_first_failing_rank_comes_before_what_the_others_saw() -> None:
    lost = TrialResult(outcome=Outcome.COMMUNICATION, reason="connection closed", phase="measure", rank=0)
    judgement = classify(replace(ENDED, result=lost, records=(PEER,), exit_codes={1: -11, 0: 1}))
    assert (judgement.outcome, judgement.rank) == (Outcome.INFRASTRUCTURE, 1)


@pytest.mark.parametrize(("written_s", "outcome"), [(49.0, Outcome.NAN), (51.0, Outcome.HANG)])
def test_a_result_written_after_the_launcher_ended_the_job_does_not_count(
    written_s: float, outcome: Outcome
) -> None:
    nan = TrialResult(outcome=Outcome.NAN, reason="loss is nan", phase="warmup", rank=0)
    ended = replace(ENDED, ending="step", ended_at_s=50.0, exit_codes={0: -9, 1: -9})
    assert classify(replace(ended, result=nan, result_at_s=written_s)).outcome is outcome


def test_a_hang_states_its_silence_and_why_it_is_too_long() -> None:
    judgement = classify(replace(ENDED, ending="step", ended_at_s=50.0, silence_s=42.5))
    assert (
        "no heartbeat for 42.5 s (20 times the slowest step so far, at least 30 s) after step 4"
        in judgement.reason
    )


def test_gpus_that_are_not_given_back_override_even_a_measurement() -> None:
    held = ("GPU 0 holds 13.50 GiB, 1.00 GiB before the trial (processes: 4242)",)
    judgement = classify(replace(ENDED, exit_code=0, result=COMPLETED, held_gpus=held))
    assert judgement.outcome is Outcome.INFRASTRUCTURE
    assert "processes: 4242" in judgement.reason


def test_an_out_of_memory_names_what_others_held_of_the_gpu() -> None:
    others = ("others held 20.00 GiB of GPU 0 (processes: 77)",)
    judgement = classify(replace(ENDED, records=(OOM,), occupied_gpus=others))
    assert judgement.outcome is Outcome.OOM
    assert judgement.reason.startswith(f"{others[0]}: OutOfMemoryError in measure")
    assert "others held" not in classify(replace(ENDED, records=(PEER,), occupied_gpus=others)).reason


FULL = "[Errno 28] No space left on device"


@pytest.mark.parametrize(
    "evidence",
    [
        replace(ENDED, records=(failed(1, "OSError", FULL, 50.0),)),
        replace(ENDED, exit_codes={1: 1}, tails={1: f"OSError: {FULL}\n"}),
        replace(ENDED, exit_codes={1: 1}, free_bytes=4096),
    ],
    ids=["recorded", "printed", "nothing could be written"],
)
def test_a_full_disk_is_reported_with_the_trials_folder(evidence: JobEvidence) -> None:
    judgement = classify(replace(evidence, folder=Path("/nights/t0007")))
    assert judgement.outcome is Outcome.INFRASTRUCTURE
    assert "no space left in measure on the disk of /nights/t0007" in judgement.reason


def test_a_port_that_is_taken_is_communication_wherever_it_is_reported() -> None:
    recorded = failed(0, "OSError", "[Errno 98] Address already in use", 50.0, "startup", 0)
    torch = (
        "The server socket has failed to listen. code: -98, name: EADDRINUSE, message: address already in use"
    )
    lost_ports = (
        replace(ENDED, records=(recorded,)),
        replace(ENDED, records=(failed(0, "torch.distributed.DistNetworkError", torch, 50.0, "startup", 0),)),
        replace(ENDED, launcher_tail=f"torch.distributed.DistNetworkError: {torch}"),
    )
    assert {classify(each).outcome for each in lost_ports} == {Outcome.COMMUNICATION}


def test_the_kernel_may_also_kill_the_launcher_for_memory() -> None:
    judgement = classify(replace(ENDED, exit_code=-9, host_oom_kills=1))
    assert (judgement.outcome, judgement.rank) == (Outcome.OOM, None)


@pytest.mark.parametrize(
    ("tail", "outcome"),
    [
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", Outcome.HANG),
        ("terminate called: Connection closed by peer [127.0.0.1]:4242", Outcome.COMMUNICATION),
        ("terminate called after throwing an instance of 'std::bad_alloc'", Outcome.OOM),
        ("CUDA error: an illegal memory access was encountered", Outcome.INFRASTRUCTURE),
    ],
)
def test_an_abort_is_judged_by_its_last_words(tail: str, outcome: Outcome) -> None:
    assert classify(replace(ENDED, exit_codes={1: -6}, tails={1: tail})).outcome is outcome


@pytest.mark.parametrize(
    ("exception", "phase", "step", "outcome"),
    [
        ("AssertionError: hidden_size must be a multiple of tp", "build", 0, Outcome.INVALID),
        ("ModuleNotFoundError: No module named 'megatron'", "startup", 0, Outcome.INFRASTRUCTURE),
        ("OSError: [Errno 28] No space left on device", "measure", 4, Outcome.INFRASTRUCTURE),
    ],
)
def test_an_exception_that_no_rank_recorded_is_read_from_the_log(
    exception: str, phase: Phase, step: int, outcome: Outcome
) -> None:
    frame = '[rank0]:   File "/opt/megatron/core/config.py", line 1, in check\n[rank0]:     assert False\n'
    tail = f"[rank0]: Traceback (most recent call last):\n{frame}[rank0]: {exception}\n"
    heartbeat = Heartbeat(phase=phase, step=step, time_s=1.0)
    judgement = classify(replace(ENDED, heartbeat=heartbeat, exit_codes={0: 1}, tails={0: tail}))
    assert (judgement.outcome, judgement.phase, judgement.rank) == (outcome, phase, 0)
    assert exception.partition(": ")[2] in judgement.reason


def test_a_failed_rendezvous_is_communication() -> None:
    text = "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: no connection"
    judgement = classify(replace(ENDED, heartbeat=None, launcher_tail=text))
    assert (judgement.outcome, judgement.phase) == (Outcome.COMMUNICATION, "startup")


def test_a_process_that_cannot_be_ended_overrides_everything() -> None:
    judgement = classify(replace(ENDED, exit_code=0, result=COMPLETED, survivors=(4242,)))
    assert judgement.outcome is Outcome.INFRASTRUCTURE
    assert "process 4242" in judgement.reason


def test_an_end_without_any_evidence_is_infrastructure_and_quotes_the_last_words() -> None:
    judgement = classify(replace(ENDED, exit_codes={1: 3}, tails={0: "zero", 1: "first\nlast words here\n"}))
    assert (judgement.outcome, judgement.rank) == (Outcome.INFRASTRUCTURE, 1)
    assert "exit code 3" in judgement.reason and "last words here" in judgement.reason


def test_a_result_that_cannot_be_read_is_reported_as_such() -> None:
    judgement = classify(replace(ENDED, exit_code=0, result_error="result.json: is not JSON"))
    assert judgement.outcome is Outcome.INFRASTRUCTURE
    assert "result.json: is not JSON" in judgement.reason


def test_every_reason_is_one_line() -> None:
    message = "CUDA out of memory.\n  Tried\tto allocate\n" + "x" * 5000
    judgement = classify(replace(ENDED, records=(failed(1, "torch.OutOfMemoryError", message, 50.0),)))
    assert "\n" not in judgement.reason and len(judgement.reason) <= 400
