"""Every rule refuses what it is there for, and says so with the numbers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rule_cases import CASES, DENSE, FULL, MIXTURE, RuleCase, on_cpu
from tests.unit.layouts import cluster, latent, workload
from tuner.core.cluster import Cluster
from tuner.core.columns import Columns
from tuner.core.layout import KNOBS, Layout, data_parallel_size, expert_data_parallel_size, min_gpus
from tuner.core.workload import Workload
from tuner.errors import InputError
from tuner.rules.validity import RULES, active_rules, broken_rules

LATENT_WITH_MTP = workload(latent(mtp_num_layers=1))


def ids_of_broken_rules(layout: Layout, work: Workload, gpus: Cluster) -> set[str]:
    return {violation.rule for violation in broken_rules(layout, work, gpus)}


@pytest.mark.parametrize("case", CASES, ids=[case.rule for case in CASES])
def test_a_rule_refuses_its_case_with_the_numbers(case: RuleCase) -> None:
    broken = broken_rules(Layout(**case.knobs), case.workload, case.cluster)
    violations = {violation.rule: violation for violation in broken}
    assert case.rule in violations
    assert case.words in violations[case.rule].message
    assert violations[case.rule].source


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == {rule.id for rule in RULES}


def test_rule_ids_are_unique_and_kebab_case() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(id == id.lower() and "_" not in id and " " not in id for id in ids)


class RecordingColumns(Columns):
    """Columns that remember which knobs were read."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.knobs_read: set[str] = set()

    def column(self, knob: str) -> Any:
        self.knobs_read.add(knob)
        return super().column(knob)


@pytest.mark.parametrize("work", [DENSE, MIXTURE, LATENT_WITH_MTP], ids=["dense", "moe", "latent"])
def test_a_rule_reads_only_the_knobs_that_it_declares(work: Workload) -> None:
    for gpus in (cluster(8), on_cpu(8)):
        for rule in RULES:
            columns = RecordingColumns.single(Layout())
            rule.mask(columns, work, gpus, 1)
            assert isinstance(columns, RecordingColumns)
            assert columns.knobs_read <= rule.knobs <= set(KNOBS), rule.id


# The examples of "Minimum GPU Count" in Megatron Bridge's skills/perf-parallelism-strategies, Apache-2.0.
MINIMUM_GPUS = [
    ({"pp": 1, "tp": 2, "cp": 1, "ep": 8, "etp": 1}, 16, 8),
    ({"pp": 1, "tp": 4, "cp": 1, "ep": 8, "etp": 1}, 32, 8),
    ({"pp": 1, "tp": 2, "cp": 2, "ep": 8, "etp": 1}, 32, 8),
    ({"pp": 1, "tp": 2, "cp": 4, "ep": 8, "etp": 1}, 64, 8),
    ({"pp": 2, "tp": 2, "cp": 1, "ep": 8, "etp": 1}, 32, 16),
    ({"pp": 1, "tp": 2, "cp": 1, "ep": 4, "etp": 2}, 16, 8),
]


@pytest.mark.parametrize(("sizes", "wrong_product", "gpus"), MINIMUM_GPUS)
def test_the_minimum_of_gpus_is_not_the_product_of_all_sizes(
    sizes: dict[str, int], wrong_product: int, gpus: int
) -> None:
    layout = Layout(**sizes, sp=sizes["tp"] > 1)  # type: ignore[arg-type]
    product = layout.pp * layout.tp * layout.cp * layout.ep * layout.etp
    assert product == wrong_product > gpus == min_gpus(layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
    assert not broken_rules(layout, MIXTURE, cluster(gpus))
    assert ids_of_broken_rules(layout, MIXTURE, cluster(gpus // 2)) & {"dense-grid", "expert-grid"}


@pytest.mark.parametrize(("gpus", "dp", "edp"), [(8, 4, 1), (16, 8, 2), (32, 16, 4)])
def test_more_gpus_than_the_minimum_replicate_both_grids(gpus: int, dp: int, edp: int) -> None:
    """The guide's example of scaling: TP=2, CP=1, EP=8, ETP=1, PP=1."""
    layout = Layout(tp=2, sp=True, ep=8)
    assert not broken_rules(layout, MIXTURE, cluster(gpus))
    assert data_parallel_size(gpus, 2, 1, 1) == dp
    assert expert_data_parallel_size(gpus, 1, 8, 1) == edp


def test_a_valid_layout_breaks_nothing() -> None:
    layout = Layout(tp=2, pp=2, vpp=2, ep=4, sp=True, overlap_p2p_comm=True, **FULL)
    assert broken_rules(layout, MIXTURE, cluster(16)) == ()


def test_a_layout_that_breaks_several_rules_hears_of_all() -> None:
    broken = broken_rules(Layout(tp=3, pp=3, cp=3, sp=True), DENSE, cluster(8))
    assert [violation.rule for violation in broken] == [
        "dense-grid",
        "expert-grid",
        "tp-inside-nvlink",
        "heads-by-tp",
        "query-groups-by-tp",
        "qkv-width-by-tp",
        "sequence-by-cp",
        "sequence-by-tp-cp",
        "layers-by-pp",
    ]


def test_a_lifted_policy_is_not_judged() -> None:
    layout, narrow = Layout(tp=8), cluster(8, nvlink_domain_gpus=4)
    assert [violation.kind for violation in broken_rules(layout, DENSE, narrow)] == ["policy"]
    assert not broken_rules(layout, DENSE, narrow, lifted={"tp-inside-nvlink"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dense-grid", "'dense-grid' is no policy"),
        ("tp-in-nvlink", "is no rule .did you mean 'tp-inside-nvlink'"),
    ],
)
def test_only_policies_and_what_newer_releases_take_can_be_lifted(name: str, message: str) -> None:
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
    st.sampled_from([DENSE, MIXTURE, LATENT_WITH_MTP]),
)
def test_any_layout_whatsoever_gets_a_verdict_with_a_reason(
    layout: Layout, gpus: int, work: Workload
) -> None:
    for violation in broken_rules(layout, work, cluster(gpus)):
        assert violation.message
        assert violation.source
