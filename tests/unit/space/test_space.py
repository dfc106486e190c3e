"""The space is exactly the layouts of a domain that keep every rule."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.layout import DEFAULTS, KNOBS, Layout, layout_from, min_gpus
from tuner.core.workload import Model, Workload
from tuner.errors import InputError
from tuner.rules.validity import RULES, broken_rules, valid_mask
from tuner.space.domain import Domain, default_domain, search_domain
from tuner.space.enumeration import Space, enumerate_layouts
from tuner.space.table import with_derived

SMALL_DOMAIN: Domain = {
    "tp": (1, 2, 3, 4),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "cp": (1, 2),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "sp": (False, True),
    "micro_batch_size": (1, 4),
    "recompute_granularity": ("none", "selective", "full"),
    "recompute_method": ("none", "uniform"),
    "recompute_num_layers": (0, 1, 3),
    "recompute_modules": ("none", "moe", "layernorm"),
    "overlap_p2p_comm": (False, True),
}


def layouts(space: Space) -> list[Layout]:
    return [layout_from(row) for row in space.table.to_dict("records")]  # type: ignore[arg-type]


def brute_force(work: Workload, domain: Domain, gpus: int) -> tuple[set[Layout], dict[str, int]]:
    """Every combination, one by one, through the rules for one layout."""
    valid: set[Layout] = set()
    broken: dict[str, int] = {}
    for values in product(*domain.values()):
        layout = layout_from(dict(zip(domain, values, strict=True)))
        if violations := broken_rules(layout, work, cluster(gpus)):
            broken[violations[0].rule] = broken.get(violations[0].rule, 0) + 1
        else:
            valid.add(layout)
    return valid, broken


GRIDS: Domain = {
    "tp": (1, 2, 3),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "cp": (1,),
    "ep": (1, 4),
    "etp": (1, 2),
    "sp": (False, True),
    "num_layers_in_first_pipeline_stage": (0, 1),
    "overlap_p2p_comm": (False, True),
}
SWITCHES: Domain = {
    "tp": (1, 2),
    "overlap_p2p_comm": (False,),
    "recompute_granularity": ("none", "selective", "full"),
    "recompute_method": ("none", "uniform"),
    "recompute_num_layers": (0, 1),
    "recompute_modules": ("none", "moe"),
    "use_distributed_optimizer": (True, False),
    "overlap_grad_reduce": (False, True),
    "overlap_param_gather": (False, True),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
}


@pytest.mark.parametrize("domain", [GRIDS, SWITCHES], ids=["grids", "switches"])
@pytest.mark.parametrize("model", [dense(), mixture(num_layers=7)], ids=["dense", "mixture"])
def test_the_table_is_what_the_rules_leave_of_every_combination(model: Model, domain: Domain) -> None:
    work = workload(model)
    space = enumerate_layouts(work, cluster(8), domain)
    valid, broken = brute_force(work, domain, 8)
    assert set(layouts(space)) == valid
    assert len(space.table) == len(valid) > 0
    assert sum(space.rejected.values()) == sum(broken.values())
    assert set(space.rejected) <= {rule.id for rule in RULES}


@settings(max_examples=25, deadline=None)
@given(
    gpus=st.sampled_from([1, 2, 4, 6, 8, 16, 48, 64]),
    batch=st.sampled_from([8, 12, 32, 96]),
    layers=st.sampled_from([4, 6, 7, 8]),
    moe=st.booleans(),
)
def test_every_row_satisfies_the_grid_equations(gpus: int, batch: int, layers: int, moe: bool) -> None:
    model = mixture(num_layers=layers) if moe else dense(num_layers=layers)
    work = workload(model, global_batch_size=batch)
    space = enumerate_layouts(work, cluster(gpus), search_domain(work, cluster(gpus)))
    table = with_derived(space.table, work, cluster(gpus)).astype({"tp": np.int64, "ep": np.int64})
    assert len(table) > 0
    assert (table.tp * table.pp * table.cp * table.dp == gpus).all()
    assert (table.pp * table.ep * table.etp * table.edp == gpus).all()
    assert (table.num_microbatches * table.micro_batch_size * table.dp == batch).all()
    sizes = (table[knob].to_numpy() for knob in ("tp", "pp", "cp", "ep", "etp"))
    assert (min_gpus(*sizes) <= gpus).all()
    assert valid_mask(space.table, work, cluster(gpus)).all()
    assert not space.table.duplicated().any()
    assert space.combinations == len(table) + sum(space.rejected.values())


def test_rows_come_back_as_the_layouts_they_are() -> None:
    work = workload(mixture())
    space = enumerate_layouts(work, cluster(8), default_domain(work, cluster(8)))
    assert tuple(space.table.columns) == KNOBS
    sample = space.table.sample(50, random_state=1)
    for index, row in zip(sample.index, sample.to_dict("records"), strict=True):
        layout = layout_from(row)  # type: ignore[arg-type]
        assert not broken_rules(layout, work, cluster(8))
        for knob, value in row.items():
            assert getattr(layout, str(knob)) == value == space.table.at[index, knob]
            assert type(getattr(layout, str(knob))) is type(DEFAULTS[str(knob)])


def test_the_order_of_rows_depends_on_the_arguments_alone() -> None:
    work = workload(mixture())
    first, second = (enumerate_layouts(work, cluster(8), SMALL_DOMAIN) for _ in range(2))
    assert first.table.equals(second.table)
    shuffled = dict(reversed(list(SMALL_DOMAIN.items())))
    assert enumerate_layouts(work, cluster(8), shuffled).table.equals(first.table)


def test_columns_are_compact() -> None:
    work = workload(mixture())
    table = enumerate_layouts(work, cluster(8), SMALL_DOMAIN).table
    assert table.dtypes["tp"] == np.int16
    assert table.dtypes["sp"] == np.bool_
    assert str(table.dtypes["recompute_granularity"]) == "category"


def test_a_fixed_knob_overrides_its_domain() -> None:
    work = workload(dense())
    space = enumerate_layouts(work, cluster(8), SMALL_DOMAIN, fixed={"tp": 2, "sp": True})
    assert set(space.table.tp) == {2}
    assert set(space.table.sp) == {True}


def test_knobs_that_are_not_named_keep_their_default_and_p2p_overlap_follows_interleaving() -> None:
    work = workload(dense())
    table = enumerate_layouts(work, cluster(8), {"pp": (1, 2, 4), "vpp": (1, 2)}).table
    assert set(table.use_distributed_optimizer) == {DEFAULTS["use_distributed_optimizer"]}
    assert set(table.tp) == {1}
    assert (table.overlap_p2p_comm == (table.vpp > 1)).all()
    assert set(table.vpp) == {1, 2}


def test_repeated_values_do_not_repeat_rows() -> None:
    work = workload(dense())
    assert len(enumerate_layouts(work, cluster(8), {"tp": (2, 2, 2)}).table) == 1


def test_a_lifted_policy_lets_its_rows_in() -> None:
    work, small = workload(dense()), cluster(8, nvlink_domain_gpus=2)
    domain: Domain = {"tp": (1, 2, 4)}
    assert set(enumerate_layouts(work, small, domain).table.tp) == {1, 2}
    assert set(enumerate_layouts(work, small, domain, lifted={"tp-inside-nvlink"}).table.tp) == {1, 2, 4}


def test_nothing_valid_gives_an_empty_table_that_says_why() -> None:
    space = enumerate_layouts(workload(dense()), cluster(8), {"tp": (3,), "pp": (1, 2)})
    assert len(space.table) == 0
    assert tuple(space.table.columns) == KNOBS
    assert sum(space.rejected.values()) == space.combinations == 4


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"pt": (1,)}, "unknown knob 'pt'"),
        ({"tp": ()}, "knob 'tp': no values"),
        ({"tp": ("two",)}, "knob 'tp'"),
        ({"tp": (0,)}, "tp must be at least 1, not 0"),
        ({"sp": (1,)}, "knob 'sp'"),
        ({"recompute_granularity": ("some",)}, "knob 'recompute_granularity'"),
    ],
)
def test_a_domain_that_cannot_be_is_refused_by_name(domain: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        enumerate_layouts(workload(dense()), cluster(8), domain)


def test_the_default_domain_names_every_knob_and_reaches_every_default() -> None:
    for model in (dense(), mixture()):
        work = workload(model)
        domain = default_domain(work, cluster(8))
        assert set(domain) == set(KNOBS)
        assert all(len(set(values)) == len(values) > 0 for values in domain.values())


def test_the_search_domain_turns_overlap_on_wherever_it_is_legal() -> None:
    work = workload(dense())
    table = enumerate_layouts(work, cluster(8), search_domain(work, cluster(8))).table
    assert table.overlap_grad_reduce.all()
    assert table.overlap_param_gather.all()
    assert (table.overlap_p2p_comm == ((table.pp > 1) & (table.vpp > 1))).all()


def test_layers_that_no_even_split_divides_still_get_pipeline_stages() -> None:
    """61 layers, as DeepSeek-V3 has, is a prime: 16 stages need uneven outer ones."""
    work = workload(dense(num_layers=61), global_batch_size=64)
    table = enumerate_layouts(work, cluster(64), search_domain(work, cluster(64))).table
    sixteen = table[table.pp == 16]
    first, last = sixteen.num_layers_in_first_pipeline_stage, sixteen.num_layers_in_last_pipeline_stage
    assert {(2, 3), (3, 2)} <= set(zip(first, last, strict=True))


def chunks_of(layout: Layout, num_layers: int) -> tuple[int, ...]:
    """Layers a chunk, rank by rank, as Megatron's get_num_layers_to_build spreads them."""
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    emb, loss = layout.account_for_embedding_in_pipeline_split, layout.account_for_loss_in_pipeline_split
    left = layout.pp - (first > 0) - (last > 0)
    ranks = [(num_layers - first - last + emb + loss) // max(left, 1)] * layout.pp
    ranks[0], ranks[-1] = first or ranks[0], last or ranks[-1]
    chunks = [size // layout.vpp for size in ranks for _ in range(layout.vpp)]
    chunks[0] -= emb
    chunks[-1] -= loss
    return tuple(chunks)


@pytest.mark.parametrize("num_layers", [4, 6, 7, 8, 10, 12, 14])
def test_no_two_rows_split_the_layers_alike_and_every_split_is_whole(num_layers: int) -> None:
    outer = tuple(range(num_layers + 1))
    domain: Domain = {
        "pp": (1, 2, 3, 4, 6),
        "vpp": (1, 2, 3),
        "num_layers_in_first_pipeline_stage": outer,
        "num_layers_in_last_pipeline_stage": outer,
        "account_for_embedding_in_pipeline_split": (False, True),
        "account_for_loss_in_pipeline_split": (False, True),
    }
    work = workload(dense(num_layers=num_layers), global_batch_size=144)
    found = layouts(enumerate_layouts(work, cluster(12), domain, lifted={"uneven-split-balanced"}))
    splits = [(layout.pp, layout.vpp, chunks_of(layout, num_layers)) for layout in found]
    assert len(set(splits)) == len(splits) > len(domain["pp"])
    assert all(sum(chunks) == num_layers and min(chunks) >= 0 for _, _, chunks in splits)
