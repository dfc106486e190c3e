"""The workload and the layout that a Megatron-LM command line states."""

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.frameworks.mixture_table import CLUSTER, TABLE
from tuner.core.environment import cuda_environment
from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.frameworks.megatron_lm.arguments import megatron_lm_arguments
from tuner.frameworks.megatron_lm.command import read_command
from tuner.space.table import layout_at

GPT = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--tokenizer-type GPT2BPETokenizer --micro-batch-size 4 --global-batch-size 64 --bf16 "
)
LLAMA = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    "--seq-length 8192 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --vocab-size 128256 --bf16 "
)

SCRIPT = """#!/bin/bash
GPUS_PER_NODE=8   # of each node
NODES=${NODES:-4}
TP=${TP:-2}
MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336   # Llama 3 8B
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --seq-length 8192 --swiglu --normalization RMSNorm --position-embedding-type rope
    --disable-bias-linear --untie-embeddings-and-output-weights --tokenizer-type Llama3Tokenizer
)
PARALLEL_ARGS=(--tensor-model-parallel-size $TP --sequence-parallel)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NODES pretrain_gpt.py ${MODEL_ARGS[@]} \\
    ${PARALLEL_ARGS[@]} --micro-batch-size 1 --global-batch-size 128 --bf16 --use-distributed-optimizer
"""


def test_what_a_command_leaves_open_has_megatron_lms_defaults() -> None:
    model = read_command(GPT, "gpt.sh", world_size=8).workload.model
    assert (model.ffn_hidden_size, model.kv_channels, model.num_query_groups) == (4096, 64, 16)
    assert (model.activation_func, model.gated_linear_unit) == ("gelu", False)
    assert (model.normalization, model.position_embedding_type) == ("LayerNorm", "learned_absolute")
    assert model.add_bias_linear and model.add_qkv_bias and model.share_embeddings_and_output_weights
    assert model.vocab_size == 50257


def test_a_gated_mlp_without_a_width_takes_two_thirds_in_multiples_of_64() -> None:
    assert read_command(LLAMA, "llama.sh", world_size=8).workload.model.ffn_hidden_size == 10880


def test_a_script_is_read_through_its_arrays_its_variables_and_torchruns_arguments() -> None:
    command = read_command(SCRIPT, "train.sh")
    assert command.world_size == 32
    assert command.layout == Layout(tp=2, sp=True)
    model, workload = command.workload.model, command.workload
    assert (model.ffn_hidden_size, model.vocab_size) == (14336, 128256)
    assert (workload.seq_length, workload.global_batch_size, workload.precision) == (8192, 128, "bf16")


def test_without_a_global_batch_each_rank_takes_one_micro_batch() -> None:
    command = read_command(
        LLAMA + "--micro-batch-size 2 --context-parallel-size 2", "llama.sh", world_size=16
    )
    assert command.workload.global_batch_size == 2 * 8


def test_sequence_parallelism_without_tensor_parallelism_is_cleared_as_megatron_lm_does() -> None:
    assert not read_command(GPT + "--sequence-parallel", "gpt.sh", world_size=1).layout.sp


def test_layers_per_virtual_stage_become_chunks() -> None:
    flags = "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2"
    layout = read_command(GPT + flags, "gpt.sh", world_size=8).layout
    assert (layout.vpp, layout.overlap_p2p_comm) == (3, True)


def test_the_deprecated_switch_of_recompute_means_selective() -> None:
    layout = read_command(GPT + "--recompute-activations", "gpt.sh", world_size=1).layout
    assert layout.recompute_granularity == "selective"


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("2", 2), ("[0]+[1]*23", (0, *[1] * 23)), ("([0]*1+[1]*5)*4", (0, 1, 1, 1, 1, 1) * 4)],
)
def test_the_pattern_of_expert_layers_is_read_and_not_evaluated(
    text: str, pattern: int | tuple[int, ...]
) -> None:
    flags = f"--num-experts 8 --moe-layer-freq '{text}' --expert-model-parallel-size 2"
    command = read_command(GPT + flags, "moe.sh", world_size=8)
    model = command.workload.model
    assert model.moe_layer_freq == pattern
    assert (model.moe_ffn_hidden_size, model.moe_router_topk) == (4096, 2)
    assert (command.layout.ep, command.layout.moe_token_dispatcher_type) == (2, "allgather")


@pytest.mark.parametrize("text", ["__import__('os')", "[0]*99999999999", "[0]**2", "[open]", "[[1]]*24"])
def test_an_expression_that_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--moe-layer-freq"):
        read_command(GPT + f'--num-experts 8 --moe-layer-freq "{text}"', "moe.sh", world_size=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python train.py --lr 1", "no --num-layers"),
        (GPT.replace("--tokenizer-type GPT2BPETokenizer", ""), "the vocabulary size is not known"),
        (GPT.replace("--seq-length 1024", ""), "no --seq-length"),
        (GPT.replace("--num-layers 24", "--num-layers many"), "invalid int value: 'many'"),
        (GPT + "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5", "must be 0"),
        (GPT + "'", "a quotation or an array is not closed"),
    ],
)
def test_an_error_names_the_command_and_the_argument(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_command(text, "train.sh", world_size=8)
    assert str(caught.value).startswith("train.sh: ")


def test_a_command_without_a_number_of_gpus_is_refused() -> None:
    with pytest.raises(InputError, match="use --gpus"):
        read_command(GPT, "gpt.sh")


def test_arguments_that_no_rule_knows_are_named() -> None:
    command = read_command(GPT + "--use-torch-fsdp2 --lr 1e-4", "gpt.sh", world_size=8)
    assert command.unjudged == ("--use-torch-fsdp2",)


def test_megatron_fsdp_shards_everything_unless_told_otherwise() -> None:
    layout = read_command(GPT + "--use-megatron-fsdp", "gpt.sh", world_size=8).layout
    assert layout.data_parallel_sharding_strategy == "optim_grads_params"
    assert layout.use_distributed_optimizer
    without = read_command(GPT + "--data-parallel-sharding-strategy optim", "gpt.sh", world_size=8).layout
    assert without.data_parallel_sharding_strategy == "no_shard"


@pytest.mark.parametrize(
    ("flags", "graphs"),
    [
        ("--cuda-graph-scope attn", ("none", "none")),
        ("--cuda-graph-impl transformer_engine", ("transformer_engine", "none")),
        (
            "--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp",
            ("transformer_engine", "attn+mlp"),
        ),
        ("--cuda-graph-impl local --cuda-graph-scope full_iteration", ("local", "full_iteration")),
        ("--cuda-graph-impl full_iteration", ("local", "full_iteration")),
    ],
)
def test_graphs_are_read_in_their_older_and_newer_words(flags: str, graphs: tuple[str, str]) -> None:
    layout = read_command(GPT + flags, "gpt.sh", world_size=8).layout
    assert (layout.cuda_graph_impl, layout.cuda_graph_scope) == graphs


@pytest.mark.parametrize(
    ("variable", "flags", "queues"),
    [
        ("1", "--tensor-model-parallel-size 2", 0),
        ("1", "", 1),
        ("1", "--tensor-model-parallel-size 2 --use-megatron-fsdp", 1),
        ("32", "--tensor-model-parallel-size 2", 32),
    ],
)
def test_a_single_queue_is_stated_unless_megatron_lm_requires_it(
    variable: str, flags: str, queues: int
) -> None:
    script = f"export CUDA_DEVICE_MAX_CONNECTIONS={variable}\npretrain_gpt.py {GPT} {flags}"
    assert read_command(script, "gpt.sh", world_size=8).layout.cuda_device_max_connections == queues


def test_the_variables_of_a_script_set_the_knobs_of_the_environment() -> None:
    script = (
        f"export NCCL_NVLS_ENABLE=0 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\npretrain_gpt.py {GPT}"
    )
    layout = read_command(script, "gpt.sh", world_size=8).layout
    assert layout.expandable_segments and not layout.nccl_nvls_enable


@given(row=st.integers(0, len(TABLE) - 1))
def test_what_is_exported_for_megatron_lm_reads_back_as_the_layout(row: int) -> None:
    layout = layout_at(TABLE, row)
    words = [word for flag, values in megatron_lm_arguments(layout).items() for word in (flag, *values)]
    model = GPT.replace("--micro-batch-size 4", "--num-experts 8")
    variables = [f"export {name}={value}" for name, value in cuda_environment(layout, CLUSTER).items()]
    script = "\n".join([*variables, model + shlex.join(words)])
    read = read_command(script, "gpt.sh", world_size=16).layout
    queues = cuda_environment(read, CLUSTER)["CUDA_DEVICE_MAX_CONNECTIONS"]
    assert f"export CUDA_DEVICE_MAX_CONNECTIONS={queues}" in variables
    assert replace(read, cuda_device_max_connections=layout.cuda_device_max_connections) == layout
