"""Every layout trains the same model: same weights, same batches, so the same losses and gradient norms.

This file is also the program that torchrun runs: one job trains many layouts, one after the other, since
importing Megatron costs more than training these models. Reference: one rank, no parallelism.

Two differences are Megatron's own and left out here. Multi-token prediction under context parallelism
averages over each rank's unmasked tokens, of which the rank with the end of the sequence has fewer. And
latent attention under tensor without sequence parallelism leaves the gradient of the rotary key unreduced.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner.core.layout import Layout
from tuner.core.workload import Model, Precision, Workload
from tuner.rules.releases import installed_release, rules_of_other_releases

STEPS = 3
TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-3

DENSE = Model(
    name="dense",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    make_vocab_size_divisible_by=32,
)
TIED = replace(
    DENSE,
    name="tied",
    position_embedding_type="learned_absolute",
    max_position_embeddings=32,
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation_func="gelu",
    add_bias_linear=True,
    add_qkv_bias=True,
    share_embeddings_and_output_weights=True,
)
WINDOW = replace(DENSE, name="window", num_query_groups=1, window_size=(8, 0), window_attn_skip_freq=2)
SINKS = replace(WINDOW, name="sinks", softmax_type="learnable", num_query_groups=2)
GEMMA = replace(
    WINDOW,
    name="gemma",
    num_query_groups=2,
    activation_func="gelu",
    share_embeddings_and_output_weights=True,
    sandwich_layernorm=True,
    # The caps are as small as the scores and logits of untrained weights, so that they have an effect.
    attn_logit_softcapping=0.01,
    final_logit_softcapping=0.1,
)
UNCAPPED = replace(GEMMA, name="uncapped", final_logit_softcapping=None)
MOE = replace(
    DENSE,
    name="moe",
    qk_layernorm=True,
    num_moe_experts=4,
    moe_ffn_hidden_size=32,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=32,
    moe_shared_expert_gate=True,
    moe_layer_freq=(0, 1, 1, 1),
)
LATENT = replace(
    DENSE,
    name="latent",
    num_query_groups=4,
    multi_latent_attention=True,
    qk_layernorm=True,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
)
PREDICTING = replace(LATENT, name="predicting", mtp_num_layers=1)
BF16 = replace(MOE, name="moe-bf16")
"""The MoE workload in bf16, which the overlap of expert communication demands."""
ALL = (DENSE, TIED, WINDOW, SINKS, GEMMA, UNCAPPED, MOE, LATENT, PREDICTING, BF16)
MODELS = {model.name: model for model in ALL}

FULL_UNIFORM = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
FULL_BLOCK = Layout(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)

PLAIN = Layout(micro_batch_size=2)
UNALIGNED = Layout(micro_batch_size=2, use_distributed_optimizer=False)
"""The tolerance for memory under the distributed optimizer: it aligns each weight in its buffer, which shows in models
as small as these."""

SINGLE: list[tuple[Model, Layout]] = [(model, PLAIN) for model in MODELS.values()] + [
    *((model, UNALIGNED) for model in (DENSE, MOE, LATENT)),
    (DENSE, Layout(micro_batch_size=8)),
    (DENSE, FULL_UNIFORM),
    (DENSE, FULL_BLOCK),
    (MOE, Layout(recompute_granularity="selective", recompute_modules="moe+core_attn+layernorm")),
    (MOE, Layout(recompute_granularity="selective", recompute_modules="mlp+shared_experts")),
    (LATENT, Layout(recompute_granularity="selective", recompute_modules="mla_up_proj")),
    (GEMMA, Layout(recompute_granularity="selective", recompute_modules="core_attn+layernorm+mlp")),
]

PARALLEL: list[tuple[Model, Layout]] = [
    (DENSE, Layout()),
    (DENSE, Layout(overlap_grad_reduce=True, overlap_param_gather=True)),
    (DENSE, Layout(tp=4, sp=True, micro_batch_size=4)),
    (DENSE, Layout(pp=2, num_layers_in_first_pipeline_stage=1)),
    (
        DENSE,
        Layout(
            pp=2,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
            recompute_granularity="selective",
        ),
    ),
    (DENSE, Layout(pp=2, vpp=2, overlap_p2p_comm=True, overlap_grad_reduce=True, overlap_param_gather=True)),
    (TIED, Layout(tp=2, pp=2, sp=True, micro_batch_size=4)),
    (TIED, Layout(pp=2, vpp=2, cp=2, overlap_p2p_comm=True, micro_batch_size=2)),
    (SINKS, Layout(tp=2, cp=2, sp=True, micro_batch_size=4)),
    (GEMMA, Layout(tp=2, cp=2, sp=True, micro_batch_size=4)),
    (MOE, Layout(ep=4)),
    (MOE, Layout(ep=2, etp=2, moe_token_dispatcher_type="allgather")),
    (MOE, Layout(tp=2, sp=True, ep=4, micro_batch_size=4)),
    (MOE, Layout(pp=2, vpp=2, ep=2, overlap_p2p_comm=True, use_distributed_optimizer=False)),
    (MOE, Layout(cp=2, ep=2, moe_shared_expert_overlap=True, micro_batch_size=2)),
    (LATENT, Layout(tp=2, sp=True, pp=2, micro_batch_size=4)),
    (PREDICTING, Layout(pp=2, vpp=2, overlap_p2p_comm=True)),
    (MOE, Layout(pp=2, vpp=2, overlap_p2p_comm=True, pipeline_model_parallel_layout="E|tt|t|tL")),
    (PREDICTING, Layout(pp=4, pipeline_model_parallel_layout="Et|tt|t|mL")),
    (PREDICTING, Layout(pp=4, pipeline_model_parallel_layout="Ett|tt|m|L")),
    (BF16, Layout(ep=2, overlap_moe_expert_parallel_comm=True)),
]
OTHER_RELEASES = rules_of_other_releases(installed_release())
if "etp-is-tp-without-ep" in OTHER_RELEASES:
    PARALLEL += [
        (MOE, Layout(etp=2)),
        (MOE, Layout(tp=2, sp=True, micro_batch_size=4, moe_token_dispatcher_type="allgather")),
    ]
if "uniform-recompute-by-chunk" in OTHER_RELEASES:
    SINGLE += [(DENSE, replace(FULL_UNIFORM, recompute_num_layers=3))]

Runs = Mapping[str, Mapping[str, Any]]


def case_id(case: tuple[Model, Layout]) -> str:
    return f"{case[0].name} {case[1].label()}"


def workload_of(model: Model) -> Workload:
    precision: Precision = "bf16" if model is BF16 else "fp32"
    return Workload(model=model, seq_length=32, global_batch_size=8, precision=precision)


def train_all(ranks: int, folder: Path) -> Runs:
    output = folder / f"{ranks}.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        __file__,
        str(output),
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    runs: Runs = json.loads(output.read_text())
    return runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train_all(1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train_all(4, tmp_path_factory.mktemp("together"))


def assert_same_training(model: Model, run: Mapping[str, Any], alone: Runs) -> None:
    reference = alone[case_id((model, PLAIN))]
    assert len(reference["losses"]) == STEPS
    tolerance = BF16_TOLERANCE if model is BF16 else TOLERANCE
    for quantity in ("losses", "grad_norms"):
        assert run[quantity] == pytest.approx(reference[quantity], rel=tolerance), quantity


@pytest.mark.parametrize("case", SINGLE, ids=case_id)
def test_recompute_and_micro_batch_size_do_not_change_the_training(
    case: tuple[Model, Layout], alone: Runs
) -> None:
    assert_same_training(case[0], alone[case_id(case)], alone)


@pytest.mark.parametrize("case", PARALLEL, ids=case_id)
def test_every_layout_trains_the_same_model(case: tuple[Model, Layout], alone: Runs, together: Runs) -> None:
    assert_same_training(case[0], together[case_id(case)], alone)


def test_training_moves_the_weights(alone: Runs) -> None:
    for model in MODELS.values():
        norms = alone[case_id((model, PLAIN))]["grad_norms"]
        assert max(norms) > min(norms) * (1 + 10 * TOLERANCE)


def test_capped_logits_give_smaller_gradients(alone: Runs) -> None:
    capped, uncapped = (alone[case_id((model, PLAIN))]["grad_norms"] for model in (GEMMA, UNCAPPED))
    assert all(bent < 0.9 * straight for bent, straight in zip(capped, uncapped, strict=True))


@pytest.mark.parametrize("model", [DENSE, MOE, LATENT], ids=lambda model: model.name)
def test_weights_gradients_and_two_moments_stay_in_memory(model: Model, alone: Runs) -> None:
    run = alone[case_id((model, UNALIGNED))]
    assert run["live_bytes"] == pytest.approx(16 * run["parameters"], rel=0.01)
    assert run["peak_bytes"] > run["live_bytes"]


def test_recomputing_layers_takes_less_memory(alone: Runs) -> None:
    peaks = {
        layout: alone[case_id((DENSE, layout))]["peak_bytes"]
        for layout in (Layout(micro_batch_size=8), FULL_UNIFORM)
    }
    assert peaks[FULL_UNIFORM] < peaks[Layout(micro_batch_size=8)]


def _train(cases: list[tuple[Model, Layout]], output: Path) -> None:
    import torch
    import torch.distributed as dist

    from launchers.programs.harness.cpu import enable_cpu
    from launchers.programs.harness.memory import TensorAccount
    from launchers.programs.megatron_core.train import TrainingJob

    torch.set_num_threads(1)
    enable_cpu()
    dist.init_process_group("gloo")
    runs: dict[str, dict[str, Any]] = {}
    for model, layout in cases:
        with TensorAccount(float("inf")) as account:
            job = TrainingJob(workload_of(model), layout, 1234, torch.device("cpu"))
            losses, grad_norms = [], []
            for _ in range(STEPS):
                local_loss, grad_norm = job.step()
                losses.append(job.mean_loss(local_loss))
                grad_norms.append(grad_norm)
            del local_loss
        runs[case_id((model, layout))] = {
            "losses": losses,
            "grad_norms": grad_norms,
            "live_bytes": account.live_bytes,
            "peak_bytes": account.peak_bytes,
            "parameters": sum(weight.numel() for chunk in job.chunks for weight in chunk.parameters()),
        }
        job.close()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(runs))
    dist.destroy_process_group()


if __name__ == "__main__":
    _train(SINGLE if os.environ["WORLD_SIZE"] == "1" else PARALLEL, Path(sys.argv[1]))
