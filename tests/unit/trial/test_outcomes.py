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
INDIVISIBLE = "First dimension of the tensor should be divisible by tensor parallel size"
NON_FINITE = "launchers.programs.harness.failures.NonFiniteLossError"
MEGATRON_NAN = (
    "Rank 0, node n, device 0, iteration 1: Unexpected result nan "
    "(message='found NaN in local forward loss calculation')"
)
LIBRARY = "/opt/venv/lib/python3.12/site-packages"
MEGATRON = f"{LIBRARY}/megatron/core/transformer/transformer_config.py"


def failure(kind: str, message: str, path: str = MEGATRON, statement: str = "raise ValueError(") -> Failure:
    """Return an exception that a statement in a file raised, below a frame of ours and one of torch."""
    frames = (("/home/me/train.py", "main()"), (f"{LIBRARY}/torch/nn/modules/module.py", "return call()"))
    lines = [f'  File "{name}", line 7, in f\n    {code}\n' for name, code in (*frames, (path, statement))]
    traceback = "Traceback (most recent call last):\n" + "".join(lines) + f"{kind}: {message}\n"
    return Failure(kind=kind, message=message, traceback=traceback, time_s=0.0)


@pytest.mark.parametrize(
    ("kind", "message", "phase", "step", "outcome"),
    [
        ("torch.OutOfMemoryError", CUDA_OOM, "forward", 1, Outcome.OOM),
        ("MemoryError", "", "build", 0, Outcome.OOM),
        ("ValueError", "Cannot use sequence parallelism without tensor", "build", 0, Outcome.INVALID),
        ("AssertionError", "", "build", 0, Outcome.INVALID),
        ("RuntimeError", "world size (4) is not divisible by 3", "build", 0, Outcome.INVALID),
        ("AssertionError", INDIVISIBLE, "forward", 0, Outcome.INVALID),
        ("AssertionError", "a check in the fourth step", "forward", 3, Outcome.INFRASTRUCTURE),
        ("OSError", "[Errno 28] No space left on device", "build", 0, Outcome.INFRASTRUCTURE),
        ("KeyboardInterrupt", "", "build", 0, Outcome.INFRASTRUCTURE),
        ("torch.AcceleratorError", "CUDA error: ECC", "forward", 0, Outcome.INFRASTRUCTURE),
        (NON_FINITE, "loss nan, gradient norm nan in step 1", "warmup", 1, Outcome.NAN),
        ("RuntimeError", MEGATRON_NAN, "forward", 0, Outcome.NAN),
    ],
)
def test_an_exception_has_the_outcome_that_it_means(
    kind: str, message: str, phase: Phase, step: int, outcome: Outcome
) -> None:
    actual, reason = outcome_of_failure(failure(kind, message), phase, step)
    assert actual is outcome
    assert kind.rpartition(".")[2] in reason
    assert phase in reason


@pytest.mark.parametrize(
    ("path", "statement", "outcome"),
    [
        (MEGATRON, "raise ValueError(", Outcome.INVALID),
        (MEGATRON, "assert self.tp > 1, (", Outcome.INVALID),
        ("/opt/Megatron-LM/megatron/training/arguments.py", "assert args.tp", Outcome.INVALID),
        (f"{LIBRARY}/transformer_engine/pytorch/module/base.py", "raise ValueError(", Outcome.INVALID),
        (f"{LIBRARY}/launchers/programs/megatron_core/config.py", "raise ValueError(", Outcome.INVALID),
        ("/home/me/my_trainer.py", "raise ValueError('no such size')", Outcome.INVALID),
        (MEGATRON, "self.weight = torch.empty(size, device='cuda')", Outcome.UNEXPLAINED),
        ("/home/me/my_trainer.py", "model.cuda()", Outcome.UNEXPLAINED),
        (
            f"{LIBRARY}/torch/cuda/__init__.py",
            "raise AssertionError('Invalid device id')",
            Outcome.UNEXPLAINED,
        ),
        ("/usr/lib/python3/dist-packages/yaml/parser.py", "raise ParserError(", Outcome.UNEXPLAINED),
    ],
)
def test_a_layout_is_refused_only_by_a_statement_of_megatron_or_of_the_users_own_code(
    path: str, statement: str, outcome: Outcome
) -> None:
    refused = failure("RuntimeError", "a text that nobody knows", path, statement)
    assert outcome_of_failure(refused, "build", 0)[0] is outcome


def test_an_exception_without_a_traceback_refuses_nothing() -> None:
    unknown = Failure(kind="ValueError", message="a text that nobody knows", traceback="", time_s=0.0)
    assert outcome_of_failure(unknown, "build", 0)[0] is Outcome.UNEXPLAINED


@given(st.text(), st.text(), st.integers(0, 100))
def test_any_exception_has_an_outcome_and_a_reason_of_one_line(kind: str, message: str, step: int) -> None:
    outcome, reason = outcome_of_failure(failure(kind, message), "forward", step)
    assert outcome in Outcome
    assert "\n" not in reason.removeprefix(kind.rpartition(".")[2])


def failed(rank: int, time_s: float, kind: str, message: str = "") -> RankRecord:
    seen = Failure(kind=kind, message=message, traceback="", time_s=time_s)
    return RankRecord(rank=rank, host="node", phase="backward", step=1, failure=seen)


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


def test_what_megatune_says_of_a_program_is_no_verdict_on_its_layout() -> None:
    raised = '  File "/opt/code/launchers/programs/load.py", line 1, in load\n    raise error\n'
    failure = Failure(
        kind="tuner.errors.InputError", message="no such function", traceback=raised, time_s=0.0
    )
    assert outcome_of_failure(failure, "build", 0)[0] is Outcome.INFRASTRUCTURE
