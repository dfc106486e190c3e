"""Random layouts, valid and invalid ones, of tiny models whose sizes few numbers divide."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from tests.rule_cases import CASES
from tuner.core.cluster import Cluster, Gpu
from tuner.core.layout import Layout, layout_from
from tuner.core.pipeline_layout import DECODER, EMBEDDING, LOSS, MTP, write
from tuner.core.workload import Model, Workload
from tuner.rules.recompute import MODULES
from tuner.rules.releases import installed_release, rules_of_other_releases
from tuner.rules.validity import broken_rules
from tuner.space.domain import Domain
from tuner.space.enumeration import enumerate_layouts

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One question for Megatron and for the rules."""

    workload: Workload
    cluster: Cluster
    layout: Layout


def _model(name: str, **fields: Any) -> Model:
    """A tiny dense model; `fields` replaces some of its fields."""
    defaults: dict[str, Any] = {
        "num_layers": 6,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 60,
        "make_vocab_size_divisible_by": 8,
    }
    return Model(name=name, **{**defaults, **fields})


_MOE: dict[str, Any] = {"num_moe_experts": 6, "moe_ffn_hidden_size": 16, "moe_router_topk": 2}
_MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 10,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
}

MODELS: tuple[Model, ...] = (
    _model("dense"),
    _model(
        "odd-heads",
        num_attention_heads=6,
        num_query_groups=3,
        kv_channels=6,
        hidden_size=30,
        ffn_hidden_size=36,
    ),
    _model(
        "one-group",
        num_attention_heads=8,
        num_query_groups=1,
        kv_channels=2,
        num_layers=7,
        ffn_hidden_size=40,
    ),
    _model("two-groups", num_attention_heads=8, num_query_groups=2, num_layers=8, window_size=(7, 0)),
    _model(
        "old",
        num_layers=10,
        gated_linear_unit=False,
        activation_func="gelu",
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        max_position_embeddings=64,
        add_bias_linear=True,
        share_embeddings_and_output_weights=True,
    ),
    _model("dense-mtp", num_layers=5, mtp_num_layers=1),
    _model("moe", **_MOE),
    _model(
        "moe-shared",
        **{**_MOE, "num_moe_experts": 8},
        moe_shared_expert_intermediate_size=24,
        moe_layer_freq=2,
    ),
    _model("moe-odd", **{**_MOE, "moe_ffn_hidden_size": 18}, num_layers=9, num_query_groups=2),
    _model("moe-bias", **_MOE, add_bias_linear=True, num_layers=4),
    _model("moe-top-1", **{**_MOE, "moe_router_topk": 1}, num_layers=4),
    _model(
        "latent",
        **_MLA,
        **{**_MOE, "num_moe_experts": 8},
        moe_shared_expert_intermediate_size=16,
        moe_layer_freq=(0, 1, 1, 1, 1, 1, 1),
        num_layers=7,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        mtp_num_layers=1,
    ),
    _model(
        "latent-dense",
        **{**_MLA, "q_lora_rank": None},
        num_layers=4,
        num_attention_heads=6,
        num_query_groups=6,
    ),
)

_SIZES = (1, 1, 1, 2, 2, 3, 4, 6, 8)
# Defaults are listed several times, so that they are drawn more often: a knob off its default makes many layouts
# invalid.
_VALUES: dict[str, tuple[Any, ...]] = {
    "tp": _SIZES,
    "pp": _SIZES,
    "vpp": (1, 1, 1, 2, 3, 4),
    "cp": (1, 1, 1, 2, 3, 4, 8),
    "ep": _SIZES,
    "etp": (1, 1, 1, 2, 3, 4),
    "sp": (False, True),
    "micro_batch_size": (1, 1, 2, 3, 4),
    "num_layers_in_first_pipeline_stage": (0, 0, 0, 1, 2, 3, 4, 6),
    "num_layers_in_last_pipeline_stage": (0, 0, 0, 1, 2, 3, 4, 6),
    "account_for_embedding_in_pipeline_split": (False, False, True),
    "account_for_loss_in_pipeline_split": (False, False, True),
    "microbatch_group_size_per_vp_stage": (0, 0, 0, 2, 3, 4, 5, 6, 8),
    "recompute_granularity": ("none", "selective", "full", "full"),
    "recompute_method": ("none", "uniform", "block"),
    "recompute_num_layers": (0, 0, 1, 2, 3),
    "recompute_modules": ("none", "none", *MODULES, "layernorm+mlp", "moe+core_attn", "core_attn+layernorm"),
    "use_distributed_optimizer": (True, False),
    "overlap_grad_reduce": (False, True),
    "overlap_param_gather": (False, True),
    "overlap_p2p_comm": (False, True),
    "tp_comm_overlap": (False, False, False, False, True),
    "moe_token_dispatcher_type": ("alltoall", "alltoall", "allgather", "flex"),
    "moe_shared_expert_overlap": (False, False, True),
    "overlap_moe_expert_parallel_comm": (False, False, False, False, True),
    "delay_wgrad_compute": (False, False, False, False, True),
    "cp_comm_type": ("p2p", "p2p", "p2p", "p2p", "a2a", "all_gather"),
}

_PLAIN_SPLIT: dict[str, Any] = {
    "num_layers_in_first_pipeline_stage": 0,
    "num_layers_in_last_pipeline_stage": 0,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
_GRID_KNOBS = ("tp", "pp", "vpp", "cp", "ep", "etp", "sp", "micro_batch_size", *_PLAIN_SPLIT)


def _recompute(
    granularity: str, method: str = "none", layers: int = 0, modules: str = "none"
) -> dict[str, Any]:
    return {
        "recompute_granularity": granularity,
        "recompute_method": method,
        "recompute_num_layers": layers,
        "recompute_modules": modules,
    }


_RECOMPUTES: tuple[dict[str, Any], ...] = (
    _recompute("none"),
    _recompute("full", "uniform", 1),
    _recompute("full", "uniform", 2),
    _recompute("full", "uniform", 3),
    _recompute("full", "block", 1),
    _recompute("full", "block", 2),
    _recompute("selective"),
    _recompute("selective", modules="layernorm"),
    _recompute("selective", modules="mlp"),
    _recompute("selective", modules="moe"),
    _recompute("selective", modules="core_attn+layernorm"),
    _recompute("selective", modules="mla_up_proj"),
    _recompute("selective", modules="shared_experts"),
    _recompute("selective", modules="layernorm+moe"),
)
OTHER_RELEASES = rules_of_other_releases(installed_release())
"""The rules that do not hold in the installed release."""
_LIFTED = OTHER_RELEASES | {"uneven-split-balanced", "interleaving-overlaps-p2p"}


def directed_draws() -> Iterator[Draw]:
    """Yield the case of every rule, moved to CPU ranks, where it may break other rules as well."""
    for case in CASES:
        cluster = cpu_cluster(case.cluster.world_size)
        yield Draw(workload=case.workload, cluster=cluster, layout=Layout(**case.knobs))


def random_draws(seed: int) -> Iterator[Draw]:
    """Yield draws without end: valid layouts, valid ones with up to two knobs changed, and some wholly at random."""
    random = Random(seed)
    while True:
        workload = Workload(
            model=random.choice(MODELS),
            seq_length=random.choice((16, 24, 32, 36)),
            global_batch_size=random.choice((8, 12, 16, 24)),
            precision=random.choice(("fp32", "bf16")),
        )
        cluster = cpu_cluster(random.choice(WORLD_SIZES))
        layout = next(filter(None, (_valid(workload, cluster, random) for _ in range(5))), None)
        if layout is None or random.random() < 0.1:
            layout = Layout(**{knob: random.choice(values) for knob, values in _VALUES.items()})
        else:
            for knob in random.sample(sorted(_VALUES), random.choice((0, 0, 1, 1, 1, 2))):
                layout = replace(layout, **{knob: random.choice(_VALUES[knob])})
            if layout.pp > 1 and random.random() < 0.2:
                layout = replace(layout, **_placement(workload.model, layout.pp * layout.vpp, random))
        yield Draw(workload=workload, cluster=cluster, layout=layout)


def cpu_cluster(world_size: int) -> Cluster:
    """A node of CPU ranks, all in one NVLink domain."""
    return Cluster(
        name=f"cpu-{world_size}",
        device="cpu",
        gpu=Gpu(name="cpu", memory_gib=4, peak_tflops={"fp32": 0.05}, memory_bandwidth_gb_per_s=10),
        gpus_per_node=world_size,
        nvlink_domain_gpus=world_size,
        nvlink_bandwidth_gb_per_s=1,
        nvlink_latency_us=10,
        fabric_bandwidth_gb_per_s=1,
        fabric_latency_us=10,
    )


def _placement(model: Model, chunks: int, random: Random) -> dict[str, Any]:
    """Knobs that place the layers by a random text; some chunks may be empty."""
    cuts = sorted(random.randint(0, model.num_layers) for _ in range(chunks - 1))
    counts = np.diff([0, *cuts, model.num_layers])
    texts = [DECODER * int(count) for count in counts]
    texts[0] = EMBEDDING + texts[0]
    # Only the chunk of the loss or the first one gets multi-token prediction: between the others Megatron exchanges
    # shapes, which a fake world can't.
    texts[random.choice((-1, -1, -1, 0))] += MTP * (model.mtp_num_layers or 0)
    texts[-1] += LOSS
    return {**_PLAIN_SPLIT, "pipeline_model_parallel_layout": write(texts)}


def _valid(workload: Workload, cluster: Cluster, random: Random) -> Layout | None:
    """A layout that the rules call valid: first its grid and split are drawn, then one knob after the other.

    None if no grid among the drawn candidates is valid.
    """
    # Three random candidates per knob let every grid come up, and keep the table small.
    domain: Domain = {
        knob: tuple(random.sample(_VALUES[knob], min(3, len(_VALUES[knob])))) for knob in _GRID_KNOBS
    }
    grids = enumerate_layouts(workload, cluster, domain, lifted=_LIFTED).table
    if not len(grids):
        return None
    row = grids.iloc[random.randrange(len(grids))]
    layout = layout_from({str(knob): value for knob, value in row.items()})
    other_knobs = sorted(set(_VALUES) - set(_GRID_KNOBS) - set(_RECOMPUTES[0]))
    changes: list[dict[str, Any]] = [{knob: random.choice(_VALUES[knob])} for knob in other_knobs]
    for change in random.sample([random.choice(_RECOMPUTES), *changes], len(changes) + 1):
        changed = replace(layout, **change)
        if not broken_rules(changed, workload, cluster, _LIFTED):
            layout = changed
    return layout
