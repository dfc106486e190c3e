"""Compare the memory predictor with an oracle: `python -m tests.bench.oracle_memory [N] [seed]`.

The layouts are random valid ones of mid-size models that are dense, have experts, or have latent attention. The oracle
runs one rank of 8 to 64 in the real program with fake tensors (launchers/programs/megatron_core/probe.py), which says
what the rank allocates.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tuner.core.cluster import Cluster, Gpu
from tuner.core.layout import Layout, data_parallel_size, layout_from, num_microbatches
from tuner.core.workload import Model, Workload
from tuner.predict.feasibility import fit_probabilities
from tuner.predict.memory.peak import StageMemory, memory_breakdown, peak_gib
from tuner.space.domain import Domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.placements import layer_placements

PROCESSES = 2
"""Processes that ask the oracle at once."""
WRITTEN_SHARE = 0.3
"""Share of the draws whose pipeline may be written out."""
MOST_MICROBATCHES = 8
"""Most micro-batches of a draw, so that a probe takes seconds. As many are in flight at once on 8 stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One rank of one layout."""

    family: str
    """Family of the model, a key of FAMILIES."""
    workload: Workload
    cluster: Cluster
    layout: Layout
    stage: StageMemory
    """Prediction for the pipeline stage of the rank."""


class MeasuredDraw(NamedTuple):
    """A draw and the answer of the oracle."""

    draw: Draw
    measured_gib: float
    """Peak of the rank in GiB."""

    @property
    def error(self) -> float:
        """Return the relative error of the prediction; it is negative if the prediction is too low."""
        return self.draw.stage.total_gib / self.measured_gib - 1


def model(name: str, **fields: Any) -> Model:
    """Return a small model with these fields."""
    defaults: dict[str, Any] = {
        "num_layers": 8,
        "hidden_size": 1024,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "kv_channels": 64,
        "vocab_size": 32000,
    }
    return Model(name=name, **{**defaults, **fields})


MOE: dict[str, Any] = {"num_moe_experts": 16, "moe_ffn_hidden_size": 704, "moe_router_topk": 4}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64,
    "qk_layernorm": True,
}

FAMILIES: dict[str, tuple[Model, ...]] = {
    "dense": (
        model("llama"),
        model("large-vocabulary", num_layers=6, vocab_size=151936, qk_layernorm=True),
        model(
            "gpt",
            ffn_hidden_size=4096,
            num_query_groups=16,
            gated_linear_unit=False,
            activation_func="gelu",
            normalization="LayerNorm",
            position_embedding_type="learned_absolute",
            max_position_embeddings=4096,
            add_bias_linear=True,
            share_embeddings_and_output_weights=True,
        ),
        model(
            "wide",
            num_layers=12,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_query_groups=8,
            window_size=(511, 0),
        ),
    ),
    "moe": (
        model("mixture", **MOE),
        model(
            "shared",
            **{**MOE, "num_moe_experts": 16, "moe_router_topk": 2},
            moe_shared_expert_intermediate_size=1408,
            moe_layer_freq=2,
            qk_layernorm=True,
        ),
        model(
            "few-large", **{**MOE, "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 2816}
        ),
    ),
    "mla": (
        model(
            "latent",
            **MLA,
            **MOE,
            moe_shared_expert_intermediate_size=704,
            moe_layer_freq=(0, *(1,) * 7),
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
        ),
        model(
            "latent-mtp",
            **{**MLA, "q_lora_rank": None},
            **MOE,
            moe_shared_expert_intermediate_size=1408,
            mtp_num_layers=1,
        ),
        model("latent-dense", **MLA, num_layers=12),
    ),
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 1, 2, 4, 8),
    "pp": (1, 2, 2, 4, 8),
    "vpp": (1, 1, 2, 3),
    "cp": (1, 1, 1, 2, 4),
    "ep": (1, 2, 4, 8),
    "etp": (1, 1, 2, 4),
    "micro_batch_size": (1, 1, 2, 4),
    "account_for_embedding_in_pipeline_split": (False, False, False, True),
    "account_for_loss_in_pipeline_split": (False, False, False, True),
    "moe_token_dispatcher_type": ("alltoall", "alltoall", "allgather"),
    "use_distributed_optimizer": (True, True, False),
    "overlap_grad_reduce": (False, True),
    "overlap_param_gather": (False, False, True),
    "overlap_moe_expert_parallel_comm": (False, False, True),
}
_SELECTIVE = (
    "none",
    "layernorm",
    "mlp",
    "moe",
    "mla_up_proj",
    "shared_experts",
    "core_attn+moe",
    "layernorm+mlp",
)
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    *({},) * 3,
    *(
        {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
        for method, layers in (("uniform", 1), ("uniform", 2), ("block", 1))
    ),
    *({"recompute_granularity": "selective", "recompute_modules": modules} for modules in _SELECTIVE),
)


def draws(seed: int, most_microbatches: int = MOST_MICROBATCHES) -> Iterator[Draw]:
    """Yield draws without end, from each family in turn."""
    random = Random(seed)
    while True:
        for family, models in FAMILIES.items():
            draw = None
            while draw is None:
                draw = _draw(family, random.choice(models), random, most_microbatches)
            yield draw


def _draw(family: str, model: Model, random: Random, most_microbatches: int) -> Draw | None:
    """Return a random valid layout of a model and one of its ranks; None if the random domain has no such layout.

    The rank is the one with the highest predicted peak, or any other, at equal chances.
    """
    cluster = cpu_cluster(random.choice((8, 16, 32, 64)))
    workload = Workload(
        model=model,
        seq_length=random.choice((1024, 2048, 4096)),
        global_batch_size=cluster.world_size * random.choice((1, 2, 4)),
        precision=random.choice(("fp32", "bf16")),
        moe_router_force_load_balancing=model.is_moe,
    )
    domain: Domain = {
        **{knob: tuple(dict.fromkeys(random.sample(values, 2))) for knob, values in _CHOICES.items()},
        **{knob: (value,) for knob, value in random.choice(_RECOMPUTE).items()},
        "sp": (False, True),
    }
    if random.random() < WRITTEN_SHARE:
        splits = [(int(pp), int(vpp)) for pp in domain["pp"] for vpp in domain["vpp"] if int(pp) > 1]
        texts = [text for pp, vpp in splits for text in layer_placements(workload, pp, vpp)]
        domain = {**domain, "pipeline_model_parallel_layout": tuple(dict.fromkeys(["none", *texts]))}
    table = enumerate_layouts(workload, cluster, domain).table
    if table.empty:
        return None
    row = table.iloc[random.randrange(len(table))]
    layout = layout_from({str(knob): value for knob, value in row.items()})
    dp = data_parallel_size(cluster.world_size, layout.tp, layout.pp, layout.cp)
    if num_microbatches(workload.global_batch_size, layout.micro_batch_size, dp) > most_microbatches:
        return None
    stages = memory_breakdown(layout, workload, cluster, "torch")
    worst = max(stages, key=lambda stage: stage.total_gib)
    stage = random.choice((worst, random.choice(stages)))
    return Draw(family=family, workload=workload, cluster=cluster, layout=layout, stage=stage)


def cpu_cluster(world_size: int) -> Cluster:
    """Return a cluster of so many CPU ranks, in one NVLink domain."""
    return Cluster(
        name=f"cpu-{world_size}",
        device="cpu",
        gpu=Gpu(name="cpu", memory_gib=64, peak_tflops={"fp32": 0.05}, memory_bandwidth_gb_per_s=10),
        gpus_per_node=world_size,
        nvlink_domain_gpus=world_size,
        nvlink_bandwidth_gb_per_s=1,
        nvlink_latency_us=10,
        fabric_bandwidth_gb_per_s=1,
        fabric_latency_us=10,
    )


def ask(draw: Draw) -> MeasuredDraw:
    """Ask the oracle about one draw."""
    from launchers.programs.megatron_core.probe import probe

    world_size = draw.cluster.world_size
    rank = draw.stage.rank * (world_size // draw.layout.pp)
    return MeasuredDraw(draw, probe(draw.workload, draw.layout, world_size, rank)[0])


def ask_all(draws_to_ask: Sequence[Draw]) -> Iterator[MeasuredDraw]:
    """Ask the oracle about each draw, in forks, since Megatron's hooks keep the objects of a model alive."""
    from launchers.programs.megatron_core.probe import prepare

    with get_context("fork").Pool(PROCESSES, prepare, (cpu_cluster(1),), maxtasksperchild=10) as pool:
        yield from pool.imap(ask, draws_to_ask)


def line(measured: MeasuredDraw) -> str:
    """Return one line about a draw: its error, its measured peak and the layout."""
    draw, stage = measured.draw, measured.draw.stage
    return (
        f"{measured.error:+7.2%} {measured.measured_gib:8.3f} GiB {stage.moment:9} {draw.workload.model.name:16} "
        f"{draw.workload.precision} seq {draw.workload.seq_length} gbs {draw.workload.global_batch_size} "
        f"world {draw.cluster.world_size} stage {stage.rank}: {draw.layout.label()}"
    )


def fit_calibration(measured_draws: Sequence[MeasuredDraw]) -> str:
    """Return a table of how many layouts fit, by their predicted probability to fit.

    GPU memories are drawn around the predicted peak of each layout.
    """
    random, stated, fits = np.random.default_rng(0), [], []
    for measured in measured_draws:
        draw = measured.draw
        table = pd.DataFrame([asdict(draw.layout)])
        peak_gib_of_worst = float(peak_gib(table, draw.workload, draw.cluster, "torch")[0])
        if draw.stage.total_gib < peak_gib_of_worst:
            continue  # another stage decides whether the layout fits
        for memory_gib in peak_gib_of_worst * np.exp(0.05 * random.normal(size=20)):
            gpu = replace(draw.cluster.gpu, memory_gib=float(memory_gib))
            stated.append(fit_probabilities(table, draw.workload, replace(draw.cluster, gpu=gpu))[0])
            fits.append(measured.measured_gib <= memory_gib)
    table = pd.DataFrame({"stated": stated, "fit": fits})
    bins = pd.cut(table["stated"], [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1])
    lines = table.groupby(bins, observed=True).agg(
        rows=("fit", "size"), stated=("stated", "mean"), fit=("fit", "mean")
    )
    return f"P(fits) before any trial, and the share that fit:\n{lines.round(3)}"


def main(count: int, seed: int) -> None:
    """Print the errors of each family, and the worst draws; the target is 2% on average."""
    started = time.perf_counter()
    measured_draws = list(ask_all(list(islice(draws(seed), count))))
    wall_s = time.perf_counter() - started
    for family in FAMILIES:
        errors = np.abs([measured.error for measured in measured_draws if measured.draw.family == family])
        over = (errors > 0.05).sum()
        print(
            f"{family:6} {len(errors):4} layouts: mean error {errors.mean():.2%}, "
            f"worst {errors.max():.2%}, {over} above 5%"
        )
    errors = np.abs([measured.error for measured in measured_draws])
    print(
        f"all    {len(errors):4} layouts: mean error {errors.mean():.2%}, worst {errors.max():.2%}; {wall_s:.0f} s"
    )
    for measured in sorted(measured_draws, key=lambda measured: -abs(measured.error))[:25]:
        print(line(measured))
    print(fit_calibration(measured_draws))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
