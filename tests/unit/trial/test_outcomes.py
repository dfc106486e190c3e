"""The outcome of a trial by the exception of a rank; names and messages are those of torch, Gloo, NCCL and Megatron."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.trial.contract import Failure, Outcome, Phase, RankRecord
from tuner.trial.outcomes import cause_of, outcome_of_failure

CUDA_OOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79.11 GiB."
GLOO_CLOSED = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3518"
)
NCCL_OOM = "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error. Cuda failure 2 'out of memory'"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes."
GLOO_TIMEOUT = "Timed out waiting 1800000ms for recv operation to complete"
INDIVISIBLE = "First dimension of the tensor should be divisible by tensor parallel size"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
NON_FINITE = "launchers.programs.harness.failures.NonFiniteLossError"
MEGATRON_NAN = (
    "Rank 0, node n, device 0, iteration 1: Unexpected result nan "
    "(message='found NaN in local forward loss calculation')"
)
NCCL = "torch.distributed.DistBackendError"


@pytest.mark.parametrize(
    ("kind", "message", "phase", "step", "outcome"),
    [
        ("torch.OutOfMemoryError", CUDA_OOM, "forward", 1, Outcome.OOM),
        ("RuntimeError", "CUDA error: out of memory", "build", 0, Outcome.OOM),
        ("RuntimeError", CUBLAS, "forward", 0, Outcome.OOM),
        ("RuntimeError", CPU_ALLOCATOR, "build", 0, Outcome.OOM),
        ("MemoryError", "", "build", 0, Outcome.OOM),
        (NCCL, NCCL_OOM, "backward", 0, Outcome.OOM),
        (NCCL, "NCCL error in: ProcessGroupNCCL.cpp:1970", "forward", 0, Outcome.COMMUNICATION),
        ("torch.distributed.DistStoreError", "wait timeout after 6 ms", "startup", 0, Outcome.COMMUNICATION),
        ("RuntimeError", GLOO_CLOSED, "backward", 0, Outcome.COMMUNICATION),
        ("RuntimeError", GLOO_TIMEOUT, "measure", 9, Outcome.COMMUNICATION),
        ("ValueError", "Cannot use sequence parallelism without tensor", "build", 0, Outcome.INVALID),
        ("AssertionError", "", "build", 0, Outcome.INVALID),
        ("RuntimeError", "world size (4) is not divisible by 3", "build", 0, Outcome.INVALID),
        ("AssertionError", INDIVISIBLE, "forward", 0, Outcome.INVALID),
        ("AssertionError", "a check in the fourth step", "forward", 3, Outcome.INFRASTRUCTURE),
        ("ImportError", "libcudart.so.12: cannot open", "startup", 0, Outcome.INFRASTRUCTURE),
        ("RuntimeError", ILLEGAL, "forward", 0, Outcome.INFRASTRUCTURE),
        ("OSError", "[Errno 28] No space left on device", "build", 0, Outcome.INFRASTRUCTURE),
        ("torch.AcceleratorError", "CUDA error: ECC", "forward", 0, Outcome.INFRASTRUCTURE),
        (NON_FINITE, "loss nan, gradient norm nan in step 1", "warmup", 1, Outcome.NAN),
        ("RuntimeError", MEGATRON_NAN, "forward", 0, Outcome.NAN),
    ],
)
def test_an_exception_has_the_outcome_that_it_means(
    kind: str, message: str, phase: Phase, step: int, outcome: Outcome
) -> None:
    actual, reason = outcome_of_failure(kind, message, phase, step)
    assert actual is outcome
    assert kind.rpartition(".")[2] in reason
    assert phase in reason


@given(st.text(), st.text(), st.integers(0, 100))
def test_any_exception_has_an_outcome_and_a_reason_of_one_line(kind: str, message: str, step: int) -> None:
    outcome, reason = outcome_of_failure(kind, message, "forward", step)
    assert outcome in Outcome
    assert "\n" not in reason.removeprefix(kind.rpartition(".")[2])


def failed(rank: int, time_s: float, kind: str, message: str = "") -> RankRecord:
    failure = Failure(kind=kind, message=message, traceback="", time_s=time_s)
    return RankRecord(rank=rank, host="node", phase="backward", step=1, failure=failure)


def test_the_earliest_failure_is_the_cause() -> None:
    records = [failed(0, 20.0, "ValueError"), failed(1, 10.0, "AssertionError")]
    assert cause_of(records) is records[1]


def test_a_later_failure_is_the_cause_rather_than_a_lost_connection() -> None:
    records = [
        failed(0, 10.0, "RuntimeError", GLOO_CLOSED),
        failed(1, 11.0, "torch.OutOfMemoryError", CUDA_OOM),
    ]
    assert cause_of(records) is records[1]


def test_a_lost_connection_is_the_cause_if_nothing_else_failed() -> None:
    records = [
        failed(0, 10.0, "RuntimeError", GLOO_CLOSED),
        RankRecord(rank=1, host="node", phase="forward", step=1),
    ]
    assert cause_of(records) is records[0]


def test_without_a_failed_rank_there_is_no_cause() -> None:
    assert cause_of([RankRecord(rank=0, host="node", phase="teardown", step=8)]) is None
