"""Every rule refuses what it is there for, and says so with the numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.layouts import cluster, dense, latent, mixture, workload
from tuner.cluster import Cluster
from tuner.errors import InputError
from tuner.layout import KNOBS, Layout, data_parallel_size, expert_data_parallel_size, min_gpus
from tuner.rules import RULES, Columns, active_rules, broken_rules
from tuner.workload import Workload

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
GROUP = "microbatch_group_size_per_vp_stage"
EXPERT_OVERLAP = {"overlap_moe_expert_parallel_comm": True}
MIXTURE, DENSE = workload(mixture()), workload(dense())


def on_cpu(gpus: int) -> Cluster:
    return cluster(gpus, device="cpu")


CASES: list[tuple[str, dict[str, Any], Workload, Cluster, str]] = [
    (
        "dense-grid",
        {"tp": 2, "pp": 4, "cp": 3},
        DENSE,
        cluster(16),
        "world size (16) % (tp*pp*cp = 2*4*3 = 24) = 16",
    ),
    (
        "expert-grid",
        {"ep": 4, "pp": 2, "etp": 2},
        MIXTURE,
        cluster(24),
        "(pp*ep*etp = 2*4*2 = 16) = 8, must be 0",
    ),
    (
        "tp-inside-nvlink",
        {"tp": 8},
        DENSE,
        cluster(8, nvlink_domain_gpus=4),
        "nvlink_domain_gpus (4) % (tp = 8) = 4",
    ),
    (
        "etp-inside-nvlink",
        {"etp": 4, "ep": 2},
        MIXTURE,
        cluster(8, nvlink_domain_gpus=2),
        "nvlink_domain_gpus (2) % (etp = 4) = 2",
    ),
    ("heads-by-tp", {"tp": 3}, DENSE, cluster(3), "num_attention_heads (8) % (tp = 3) = 2"),
    (
        "query-groups-by-tp",
        {"tp": 4},
        workload(dense(num_attention_heads=12, num_query_groups=6)),
        cluster(4),
        "6 % 4 = 2 and 4 % 6 = 4",
    ),
    (
        "qkv-width-by-tp",
        {"tp": 8},
        workload(dense(num_query_groups=1, kv_channels=3)),
        cluster(8),
        "kv_channels*(heads + 2*groups) = 3*(8 + 2*1) (30) % (tp = 8) = 6",
    ),
    (
        "ffn-by-tp",
        {"tp": 4},
        workload(dense(ffn_hidden_size=90)),
        cluster(4),
        "ffn_hidden_size (90) % (tp = 4) = 2",
    ),
    (
        "shared-expert-ffn-by-tp",
        {"tp": 4, "sp": True},
        workload(mixture(moe_shared_expert_intermediate_size=42)),
        cluster(4),
        "moe_shared_expert_intermediate_size (42) % (tp = 4) = 2",
    ),
    (
        "moe-ffn-by-etp",
        {"etp": 4, "ep": 2},
        workload(mixture(moe_ffn_hidden_size=42)),
        cluster(8),
        "moe_ffn_hidden_size (42) % (etp = 4) = 2",
    ),
    ("sp-needs-tp", {"sp": True}, DENSE, cluster(1), "tp is 1"),
    ("sequence-by-cp", {"cp": 3}, DENSE, cluster(3), "seq_length (64) % (2*cp = 2*3 = 6) = 4"),
    (
        "sequence-by-tp-cp",
        {"tp": 8, "sp": True, "cp": 2},
        workload(dense(), seq_length=36),
        cluster(16),
        "seq_length (36) % (tp*cp = 8*2 = 16) = 4, must be 0",
    ),
    ("precision-needs-cuda", {}, workload(dense(), precision="fp8"), on_cpu(1), "precision fp8"),
    ("ep-needs-experts", {"ep": 2}, DENSE, cluster(2), "ep is 2"),
    ("etp-needs-experts", {"etp": 2}, DENSE, cluster(2), "etp is 2"),
    (
        "etp-is-tp-without-ep",
        {"tp": 2, "sp": True},
        MIXTURE,
        cluster(2),
        "etp (1) is not tp (2): set etp to 2",
    ),
    ("experts-by-ep", {"ep": 3}, MIXTURE, cluster(3), "num_moe_experts (8) % (ep = 3) = 2"),
    ("moe-tp-needs-sp", {"tp": 2, "ep": 2}, MIXTURE, cluster(2), "tp (2) > 1"),
    (
        "moe-bias-needs-etp-1",
        {"ep": 2, "etp": 2},
        workload(mixture(add_bias_linear=True)),
        cluster(4),
        "etp is 2",
    ),
    (
        "dispatcher-needs-experts",
        {"moe_token_dispatcher_type": "allgather"},
        DENSE,
        cluster(1),
        "is allgather",
    ),
    ("flex-needs-expert-ranks", {"moe_token_dispatcher_type": "flex"}, MIXTURE, cluster(1), "it is 1*1 = 1"),
    ("flex-needs-deepep", {"moe_token_dispatcher_type": "flex", "ep": 2}, MIXTURE, on_cpu(2), "needs DeepEP"),
    (
        "shared-overlap-needs-shared-experts",
        {"moe_shared_expert_overlap": True},
        workload(mixture(moe_shared_expert_intermediate_size=None)),
        cluster(1),
        "test-mixture has no shared experts",
    ),
    (
        "shared-overlap-needs-alltoall",
        {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "allgather"},
        MIXTURE,
        cluster(1),
        "not allgather",
    ),
    (
        "shared-overlap-excludes-recompute",
        {
            "moe_shared_expert_overlap": True,
            "recompute_granularity": "selective",
            "recompute_modules": "shared_experts",
        },
        MIXTURE,
        cluster(1),
        "recompute_modules shared_experts",
    ),
    ("top-1-needs-pre-softmax", {}, workload(mixture(moe_router_topk=1)), cluster(1), "moe_router_topk is 1"),
    (
        "expert-bias-needs-sigmoid",
        {},
        workload(mixture(moe_router_enable_expert_bias=True)),
        cluster(1),
        "not softmax",
    ),
    (
        "router-groups",
        {},
        workload(mixture(moe_router_num_groups=3, moe_router_group_topk=2)),
        cluster(1),
        "moe_router_num_groups (3) at least as large and a divisor of num_moe_experts (8)",
    ),
    ("expert-bias-needs-cuda", {}, workload(mixture(add_bias_linear=True)), on_cpu(1), "test-mixture"),
    ("vpp-needs-pp", {"vpp": 2}, DENSE, cluster(1), "vpp is 2, but pp is 1"),
    ("uneven-split-needs-pp", {FIRST: 8}, DENSE, cluster(1), "pp is 1: one stage holds all 8 layers"),
    ("uneven-split-needs-pp", {EMBEDDING: True}, DENSE, cluster(1), "pp is 1: one stage holds all 8 layers"),
    (
        "uneven-or-accounted",
        {"pp": 4, FIRST: 1, LAST: 1, LOSS: True},
        DENSE,
        cluster(4),
        "first (1) or last (1) is stated",
    ),
    ("layers-by-pp", {"pp": 3}, DENSE, cluster(3), "num_layers (8) % (pp = 3) = 2"),
    (
        "layers-by-pp",
        {"pp": 4, LOSS: True},
        DENSE,
        cluster(4),
        "num_layers + 1 accounted slots (9) % (pp = 4) = 1",
    ),
    (
        "uneven-rest-by-stages",
        {"pp": 4, FIRST: 1},
        DENSE,
        cluster(4),
        "num_layers (8) - first (1) - last (0) = 7 layers do not go evenly onto the 3 stages left of pp (4)",
    ),
    (
        "uneven-rest-by-stages",
        {"pp": 4, FIRST: 7, LAST: 5},
        DENSE,
        cluster(4),
        "= -4 layers do not go evenly onto the 2 stages left",
    ),
    (
        "stage-layers-by-vpp",
        {"pp": 2, "vpp": 3, "overlap_p2p_comm": True},
        DENSE,
        cluster(2),
        "vpp (3) must divide the layers of every pipeline rank (first 4, middle 4, last 4",
    ),
    (
        "mtp-needs-a-layer",
        {"pp": 3, "vpp": 3, LOSS: True, "overlap_p2p_comm": True, "micro_batch_size": 2},
        workload(dense(mtp_num_layers=1), global_batch_size=12),
        cluster(3),
        "the last chunk of pp (3) * vpp (3) chunks holds no layer",
    ),
    ("uneven-split-says-something", {"pp": 4, FIRST: 2}, DENSE, cluster(4), "first (2) or last (0) repeats"),
    ("uneven-split-says-something", {"pp": 2, LAST: 3}, DENSE, cluster(2), "with two stages only the first"),
    (
        "uneven-split-not-as-accounted",
        {"pp": 4, FIRST: 2, LAST: 2},
        workload(dense(num_layers=10)),
        cluster(4),
        "first (2) and last (2) of 10 layers on pp 4 are one layer short",
    ),
    (
        "uneven-split-balanced",
        {"pp": 4, FIRST: 1, LAST: 5},
        DENSE,
        cluster(4),
        "even share of 8 layers / pp (4) = 2",
    ),
    (
        "batch-by-micro-batch",
        {"micro_batch_size": 3},
        DENSE,
        cluster(4),
        "global_batch_size (32) % (micro_batch_size*dp = 3*4 = 12) = 8",
    ),
    (
        "interleaving-group-range",
        {"pp": 4, "vpp": 2, "overlap_p2p_comm": True, "micro_batch_size": 16},
        DENSE,
        cluster(4),
        "pp = 4, group = 4, micro-batches = 2",
    ),
    (
        "interleaving-group-remainder",
        {"pp": 4, "vpp": 2, "overlap_p2p_comm": True},
        workload(dense(), global_batch_size=10),
        cluster(4),
        "micro-batches (10) % group (4) = 2, which must be 0 or at least pp (4)",
    ),
    (
        "group-only-if-it-differs",
        {GROUP: 4},
        DENSE,
        cluster(1),
        f"{GROUP} (4) says nothing with vpp 1 and pp 1",
    ),
    (
        "full-recompute-needs-method",
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        DENSE,
        cluster(1),
        "at least 1 (it is 0)",
    ),
    (
        "selective-recompute-counts-no-layers",
        {"recompute_granularity": "selective", "recompute_num_layers": 3},
        DENSE,
        cluster(1),
        "recompute_num_layers is 3",
    ),
    (
        "method-only-with-full-recompute",
        {"recompute_method": "block", "recompute_num_layers": 2},
        DENSE,
        cluster(1),
        "recompute_method (block) and recompute_num_layers (2)",
    ),
    (
        "modules-only-with-selective-recompute",
        {**FULL, "recompute_modules": "layernorm"},
        DENSE,
        cluster(1),
        "recompute_modules (layernorm) is read with selective recompute only, not full",
    ),
    (
        "recompute-modules-known",
        {"recompute_granularity": "selective", "recompute_modules": "attn"},
        DENSE,
        cluster(1),
        "names attn; known are core_attn",
    ),
    (
        "recompute-modules-in-order",
        {"recompute_granularity": "selective", "recompute_modules": "mlp+layernorm"},
        DENSE,
        cluster(1),
        "recompute_modules (mlp+layernorm)",
    ),
    (
        "recompute-modules-in-order",
        {"recompute_granularity": "selective", "recompute_modules": "core_attn"},
        DENSE,
        cluster(1),
        "core_attn alone as none",
    ),
    (
        "recompute-modules-in-model",
        {"recompute_granularity": "selective", "recompute_modules": "moe"},
        DENSE,
        cluster(1),
        "test-dense has no moe to recompute",
    ),
    (
        "mla-up-proj-needs-mla",
        {"recompute_granularity": "selective", "recompute_modules": "mla_up_proj"},
        DENSE,
        cluster(1),
        "names mla_up_proj, but test-dense has no multi-latent attention",
    ),
    (
        "mlp-recompute-needs-no-bias",
        {"recompute_granularity": "selective", "recompute_modules": "mlp"},
        workload(dense(add_bias_linear=True)),
        cluster(1),
        "recompute_modules (mlp) names mlp, but test-dense has biases",
    ),
    (
        "moe-act-needs-grouped-gemm",
        {"recompute_granularity": "selective", "recompute_modules": "moe_act"},
        MIXTURE,
        on_cpu(1),
        "names moe_act",
    ),
    (
        "uniform-recompute-by-chunk",
        {**FULL, "recompute_num_layers": 3, "pp": 2},
        DENSE,
        cluster(2),
        "recompute_num_layers (3) must divide the layers of every chunk (first 4, between 4, last 4)",
    ),
    (
        "block-recompute-below-chunk",
        {**FULL, "recompute_method": "block", "recompute_num_layers": 4, "pp": 2},
        DENSE,
        cluster(2),
        "recompute_num_layers (4) layers takes every layer of a chunk (at most 4)",
    ),
    (
        "mtp-recompute-by-one",
        {**FULL, "recompute_num_layers": 2},
        workload(dense(mtp_num_layers=1)),
        cluster(1),
        "recompute_num_layers is 2",
    ),
    (
        "p2p-overlap-needs-interleaving",
        {"pp": 2, "overlap_p2p_comm": True},
        DENSE,
        cluster(2),
        "vpp is 1 (pp 2)",
    ),
    ("p2p-overlap-needs-pp", {"overlap_p2p_comm": True}, DENSE, cluster(1), "pp is 1"),
    (
        "interleaving-overlaps-p2p",
        {"pp": 2, "vpp": 2},
        DENSE,
        cluster(2),
        "vpp is 2 without overlap_p2p_comm",
    ),
    (
        "param-gather-overlap-needs-both",
        {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False},
        DENSE,
        cluster(2),
        "use_distributed_optimizer (it is False)",
    ),
    ("tp-overlap-needs-sp", {"tp_comm_overlap": True, "tp": 2}, DENSE, cluster(2), "sp is False (tp 2)"),
    (
        "tp-overlap-needs-cuda",
        {"tp_comm_overlap": True, "tp": 2, "sp": True},
        DENSE,
        on_cpu(2),
        "device is cpu",
    ),
    ("expert-overlap-needs-ep", EXPERT_OVERLAP, MIXTURE, cluster(1), "needs ep > 1, but it is 1"),
    (
        "expert-overlap-needs-vpp",
        {**EXPERT_OVERLAP, "ep": 2, "pp": 2},
        MIXTURE,
        cluster(4),
        "pp is 2 and vpp 1",
    ),
    (
        "expert-overlap-needs-all-to-all",
        {**EXPERT_OVERLAP, "ep": 2, "moe_token_dispatcher_type": "allgather"},
        MIXTURE,
        cluster(2),
        "not allgather",
    ),
    (
        "expert-overlap-excludes-full-recompute",
        {**EXPERT_OVERLAP, **FULL, "ep": 2},
        MIXTURE,
        cluster(2),
        "granularity full, method uniform, 1 layers",
    ),
    (
        "expert-overlap-excludes-moe-recompute",
        {**EXPERT_OVERLAP, "ep": 2, "recompute_granularity": "selective", "recompute_modules": "moe"},
        MIXTURE,
        cluster(2),
        "recompute_modules is moe",
    ),
    (
        "expert-overlap-excludes-shared-overlap",
        {**EXPERT_OVERLAP, "ep": 2, "moe_shared_expert_overlap": True},
        MIXTURE,
        cluster(2),
        "excludes moe_shared_expert_overlap",
    ),
    (
        "expert-overlap-needs-half-precision",
        {**EXPERT_OVERLAP, "ep": 2},
        workload(mixture(), precision="fp32"),
        cluster(2),
        "not fp32",
    ),
    (
        "expert-overlap-and-mtp",
        {**EXPERT_OVERLAP, "ep": 2},
        workload(mixture(mtp_num_layers=1)),
        cluster(2),
        "(the model has 1) and then needs pp > 1 (it is 1)",
    ),
    (
        "delayed-wgrad-needs-expert-overlap",
        {"delay_wgrad_compute": True},
        MIXTURE,
        cluster(1),
        "needs overlap_moe_expert_parallel_comm",
    ),
    (
        "delayed-wgrad-needs-cuda",
        {**EXPERT_OVERLAP, "delay_wgrad_compute": True, "ep": 2},
        MIXTURE,
        on_cpu(2),
        "delay_wgrad_compute needs Transformer Engine",
    ),
]


@pytest.mark.parametrize(("rule", "knobs", "work", "gpus", "words"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_refuses_its_case_with_the_numbers(
    rule: str, knobs: dict[str, Any], work: Workload, gpus: Cluster, words: str
) -> None:
    broken = {violation.rule: violation for violation in broken_rules(Layout(**knobs), work, gpus)}
    assert rule in broken
    assert words in broken[rule].message
    assert broken[rule].source


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in CASES} == {rule.id for rule in RULES}


def test_rule_ids_are_unique_and_kebab_case() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(id == id.lower() and "_" not in id and " " not in id for id in ids)


class Recording(Columns):
    """Columns that remember which knobs were read."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.read: set[str] = set()

    def column(self, knob: str) -> Any:
        self.read.add(knob)
        return super().column(knob)


@pytest.mark.parametrize(
    "work", [DENSE, MIXTURE, workload(latent(mtp_num_layers=1))], ids=["dense", "moe", "latent"]
)
def test_a_rule_reads_only_the_knobs_that_it_declares(work: Workload) -> None:
    for gpus in (cluster(8), on_cpu(8)):
        for rule in RULES:
            columns = Recording.single(Layout())
            rule.mask(columns, work, gpus, 1)
            assert isinstance(columns, Recording)
            assert columns.read <= rule.knobs <= set(KNOBS), rule.id


# The examples of "Minimum GPU Count" in Megatron Bridge's skills/perf-parallelism-strategies, Apache-2.0.
GUIDE = [
    ({"pp": 1, "tp": 2, "cp": 1, "ep": 8, "etp": 1}, 16, 8),
    ({"pp": 1, "tp": 4, "cp": 1, "ep": 8, "etp": 1}, 32, 8),
    ({"pp": 1, "tp": 2, "cp": 2, "ep": 8, "etp": 1}, 32, 8),
    ({"pp": 1, "tp": 2, "cp": 4, "ep": 8, "etp": 1}, 64, 8),
    ({"pp": 2, "tp": 2, "cp": 1, "ep": 8, "etp": 1}, 32, 16),
    ({"pp": 1, "tp": 2, "cp": 1, "ep": 4, "etp": 2}, 16, 8),
]


@pytest.mark.parametrize(("sizes", "wrong_product", "gpus"), GUIDE)
def test_the_minimum_of_gpus_is_not_the_product_of_all_sizes(
    sizes: dict[str, int], wrong_product: int, gpus: int
) -> None:
    layout = Layout(**sizes, sp=sizes["tp"] > 1)  # type: ignore[arg-type]
    product = layout.pp * layout.tp * layout.cp * layout.ep * layout.etp
    assert product == wrong_product > gpus == min_gpus(layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
    assert not broken_rules(layout, MIXTURE, cluster(gpus))
    too_few = {violation.rule for violation in broken_rules(layout, MIXTURE, cluster(gpus // 2))}
    assert too_few & {"dense-grid", "expert-grid"}


@pytest.mark.parametrize(("gpus", "dp", "edp"), [(8, 4, 1), (16, 8, 2), (32, 16, 4)])
def test_more_gpus_than_the_minimum_replicate_both_grids(gpus: int, dp: int, edp: int) -> None:
    """The guide's example of scaling: TP=2, CP=1, EP=8, ETP=1, PP=1."""
    layout = Layout(tp=2, sp=True, ep=8)
    assert not broken_rules(layout, MIXTURE, cluster(gpus))
    assert data_parallel_size(gpus, 2, 1, 1) == dp
    assert expert_data_parallel_size(gpus, 1, 8, 1) == edp


def test_a_valid_layout_breaks_nothing() -> None:
    layout = Layout(tp=2, pp=2, vpp=2, ep=4, sp=True, overlap_p2p_comm=True, **FULL)  # type: ignore[arg-type]
    assert broken_rules(layout, MIXTURE, cluster(16)) == ()


def test_a_layout_that_breaks_several_rules_hears_of_all() -> None:
    broken = broken_rules(Layout(tp=3, pp=3, cp=3, sp=True), DENSE, cluster(8))
    assert [violation.rule for violation in broken] == [
        *("dense-grid", "expert-grid", "tp-inside-nvlink", "heads-by-tp", "query-groups-by-tp"),
        *("qkv-width-by-tp", "sequence-by-cp", "sequence-by-tp-cp", "layers-by-pp"),
    ]


def test_a_lifted_policy_is_not_judged() -> None:
    layout, small = Layout(tp=8), cluster(8, nvlink_domain_gpus=4)
    assert [violation.kind for violation in broken_rules(layout, DENSE, small)] == ["policy"]
    assert not broken_rules(layout, DENSE, small, lifted={"tp-inside-nvlink"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dense-grid", "'dense-grid' is no policy"),
        ("tp-in-nvlink", "is no rule .did you mean 'tp-inside-nvlink'"),
    ],
)
def test_only_policies_can_be_lifted(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        active_rules({name})


@given(
    st.builds(
        Layout,
        tp=st.integers(1, 64),
        pp=st.integers(1, 64),
        vpp=st.integers(1, 8),
        cp=st.integers(1, 64),
        ep=st.integers(1, 64),
        etp=st.integers(1, 64),
        micro_batch_size=st.integers(1, 64),
        num_layers_in_first_pipeline_stage=st.integers(0, 12),
        num_layers_in_last_pipeline_stage=st.integers(0, 12),
        microbatch_group_size_per_vp_stage=st.integers(0, 12),
        recompute_num_layers=st.integers(0, 12),
        recompute_granularity=st.sampled_from(["none", "selective", "full"]),
        recompute_method=st.sampled_from(["none", "uniform", "block"]),
        recompute_modules=st.text(max_size=12),
    ),
    st.sampled_from([1, 8, 24]),
    st.sampled_from([DENSE, MIXTURE, workload(latent(mtp_num_layers=1))]),
)
def test_any_layout_whatsoever_gets_a_verdict_with_a_reason(
    layout: Layout, gpus: int, work: Workload
) -> None:
    for violation in broken_rules(layout, work, cluster(gpus)):
        assert violation.message
        assert violation.source
