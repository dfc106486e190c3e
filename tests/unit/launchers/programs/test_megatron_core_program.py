"""The parts of the Megatron-Core program that need no other rank: tokens, weights, masks and the memory account."""

from itertools import chain, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils

from launchers.programs.harness.attention import TorchCoreAttention, attention_mask, chunk_positions
from launchers.programs.harness.memory import TensorAccount
from launchers.programs.harness.weights import STD, uniform
from launchers.programs.megatron_core import config as config_module
from launchers.programs.megatron_core.config import transformer_config
from launchers.programs.megatron_core.data import micro_batches, sample
from search_spaces.loader import load_model, model_names
from tests.trials import MODEL
from tuner.core.layout import Layout
from tuner.core.workload import Workload

CPU = torch.device("cpu")
WORKLOAD = Workload(model=MODEL, seq_length=16, global_batch_size=8, precision="fp32")


def rows_of_step(layout: Layout, dp: int, step: int) -> list[tuple[int, ...]]:
    """Return all samples that the ranks read in a step, each joined over the context parallel ranks."""
    rows = []
    for dp_rank in range(dp):
        parts = [
            list(
                micro_batches(
                    WORKLOAD, layout, 5, step=step, dp_rank=dp_rank, dp=dp, cp_rank=cp_rank, device=CPU
                )
            )
            for cp_rank in range(layout.cp)
        ]
        for batches in zip(*parts, strict=True):
            order = torch.argsort(torch.cat([batch["position_ids"] for batch in batches], dim=1), dim=1)
            tokens = torch.cat([batch["tokens"] for batch in batches], dim=1).gather(1, order)
            labels = torch.cat([batch["labels"] for batch in batches], dim=1).gather(1, order)
            assert torch.equal(tokens[:, 1:], labels[:, :-1])
            rows += [tuple(row) for row in torch.cat([tokens, labels[:, -1:]], dim=1).tolist()]
    return sorted(rows)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_every_layout_reads_the_same_global_batch(micro: int, dp: int, cp: int, step: int) -> None:
    expected = [tuple(sample(5, step * 8 + number, 16, MODEL.vocab_size).tolist()) for number in range(8)]
    assert rows_of_step(Layout(micro_batch_size=micro, cp=cp), dp, step) == sorted(expected)


def test_steps_read_different_samples() -> None:
    assert not set(rows_of_step(Layout(), 1, 0)) & set(rows_of_step(Layout(), 1, 1))


@given(st.integers(1, 8), st.integers(1, 8))
def test_chunks_cover_the_sequence_and_divide_the_causal_work_evenly(cp: int, half: int) -> None:
    length = 2 * half
    parts = [chunk_positions(length, cp, rank, CPU) for rank in range(cp)]
    assert sorted(chain.from_iterable(part.tolist() for part in parts)) == list(range(length * cp))
    assert len({int(part.sum()) for part in parts}) == 1


@given(st.integers(1, 12), st.integers(0, 12))
def test_a_window_lets_a_token_see_itself_and_as_many_tokens_before_it_as_it_is_wide(
    length: int, window: int
) -> None:
    positions = torch.arange(length)
    mask = attention_mask(positions, positions, (window, 0))
    assert mask.sum(dim=1).tolist() == [min(row, window) + 1 for row in range(length)]
    assert torch.equal(attention_mask(positions, positions, (-1, 0)), torch.ones_like(mask).tril())


def test_weights_look_like_independent_draws_of_the_right_spread() -> None:
    values = uniform(torch.arange(200_000), 12345)
    assert float(values.mean()) == pytest.approx(0.0, abs=3 * STD / 200_000**0.5)
    assert float(values.std()) == pytest.approx(STD, rel=0.01)
    assert float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) == pytest.approx(0.0, abs=0.01)
    other = uniform(torch.arange(200_000), 12346)
    assert float(torch.corrcoef(torch.stack([values, other]))[0, 1]) == pytest.approx(0.0, abs=0.01)


def test_an_emptied_storage_leaves_the_account_and_returns_when_it_is_filled() -> None:
    with TensorAccount(1e9) as account:
        tensor = torch.ones(1000)
        assert account.live_bytes == 4000
        tensor.untyped_storage().resize_(0)
        assert account.live_bytes == 0
        tensor.untyped_storage().resize_(4000)
        assert account.live_bytes == 4000
    tensor.untyped_storage().resize_(0)
    del tensor
    assert account.live_bytes == 0
    assert account.peak_bytes == 4000


def test_the_account_of_a_two_layer_network_follows_from_the_shapes() -> None:
    n, width, hidden = 64, 32, 128
    with TensorAccount(float("inf")) as account:
        x = torch.randn(n, width)
        first = torch.randn(width, hidden).requires_grad_()
        second = torch.randn(hidden, width).requires_grad_()
        weights = 2 * width * hidden
        assert account.live_bytes == 4 * (n * width + weights)
        active = torch.relu(x @ first)
        # relu saves its output; the product before it is freed.
        assert account.live_bytes == 4 * (n * width + weights + n * hidden)
        assert account.peak_bytes == 4 * (n * width + weights + 2 * n * hidden)
        output = active.view(n, hidden) @ second
        output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
        del active, output
        assert account.live_bytes == 4 * (n * width + 2 * weights)  # weights and their gradients
        optimizer = torch.optim.AdamW([first, second], foreach=False)
        optimizer.step()
        assert account.live_bytes == pytest.approx(4 * (n * width + 4 * weights), abs=64)  # two moments
        optimizer.zero_grad()
        assert account.live_bytes == pytest.approx(4 * (n * width + 3 * weights), abs=64)


def test_a_tensor_that_does_not_fit_is_refused_in_the_words_of_cuda() -> None:
    with (
        TensorAccount(1024.0**2),
        pytest.raises(torch.OutOfMemoryError, match=r"out of memory.*Tried to allocate 2\.00 MiB"),
    ):
        torch.zeros(2**19)


def test_freed_memory_can_be_taken_again() -> None:
    with TensorAccount(1024.0**2) as account:
        for _ in range(3):
            torch.zeros(2**17)
    assert account.live_bytes == 0
    assert account.peak_bytes == 2**19


def test_a_configuration_that_needs_cuda_is_refused_on_cpu() -> None:
    fp8 = Workload(model=MODEL, seq_length=16, global_batch_size=8, precision="fp8")
    with pytest.raises(ValueError, match="precision fp8 needs CUDA"):
        transformer_config(fp8, Layout(), "cpu")
    with pytest.raises(ValueError, match="tp_comm_overlap needs Transformer Engine"):
        transformer_config(WORKLOAD, Layout(tp=2, sp=True, tp_comm_overlap=True), "cpu")


@pytest.mark.parametrize("window_size", [None, (3, 0)])
def test_a_sink_takes_a_share_of_every_softmax_and_adds_no_value(
    window_size: tuple[int, int] | None,
) -> None:
    torch.manual_seed(0)
    length, heads, groups, width = 8, 4, 2, 6
    config = SimpleNamespace(
        softmax_type="learnable",
        num_attention_heads=heads,
        tensor_model_parallel_size=1,
        params_dtype=torch.float32,
        window_size=window_size,
        window_attn_skip_freq=None,
    )
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    attention = TorchCoreAttention(config, 1, None, "self", pg_collection=alone)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    assert attention.softmax_offset is not None
    attention.softmax_offset.data.copy_(sinks)
    query = torch.randn(length, 1, heads, width)
    key, value = (torch.randn(length, 1, groups, width) for _ in range(2))

    expected = torch.zeros(length, heads, width)
    for head in range(heads):
        group = head // (heads // groups)
        for place in range(length):
            first = 0 if window_size is None else max(0, place - window_size[0])
            scores = key[first : place + 1, 0, group] @ query[place, 0, head] / width**0.5
            weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
            expected[place, head] = weights @ value[first : place + 1, 0, group]
    torch.testing.assert_close(attention(query, key, value)[:, 0], expected.flatten(1))


@pytest.mark.parametrize("window_size", [None, (3, 0)])
def test_capped_attention_caps_every_score_before_the_softmax(window_size: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    length, batch, heads, groups, width, cap = 8, 2, 4, 2, 6, 0.5
    config = SimpleNamespace(softmax_type="vanilla", window_size=window_size, window_attn_skip_freq=None)
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    attention = TorchCoreAttention(config, 1, None, "self", pg_collection=alone, softcap=cap)
    query = torch.randn(length, batch, heads, width)
    key, value = (torch.randn(length, batch, groups, width) for _ in range(2))

    expected = torch.zeros(length, batch, heads, width)
    for row, head, place in product(range(batch), range(heads), range(length)):
        group = head // (heads // groups)
        first = 0 if window_size is None else max(0, place - window_size[0])
        scores = key[first : place + 1, row, group] @ query[place, row, head] / width**0.5
        weights = (cap * (scores / cap).tanh()).softmax(dim=0)
        expected[place, row, head] = weights @ value[first : place + 1, row, group]
    torch.testing.assert_close(attention(query, key, value), expected.flatten(2))


@pytest.mark.parametrize("name", model_names())
def test_megatron_accepts_the_fusions_that_are_chosen_beside_transformer_engine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "have_transformer_engine", lambda device: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *_: None)
    for kernel in (
        "permute",
        "permute_with_probs",
        "sort_chunks_by_index",
        "sort_chunks_by_index_with_probs",
        "unpermute",
    ):
        monkeypatch.setattr(moe_utils, f"fused_{kernel}", lambda *_: None, raising=False)
    model = load_model(name)
    workload = Workload(model=model, seq_length=128, global_batch_size=8, precision="bf16")
    config = transformer_config(workload, Layout(), "cuda")
    # Two refusals of TEGroupedMLP (moe/experts.py), which cannot be built without Transformer Engine.
    if model.is_moe and model.add_bias_linear:
        assert not config.bias_dropout_fusion
    if model.is_moe and config.bias_activation_fusion:
        assert config.activation_func in {torch.nn.functional.silu, quick_gelu}
