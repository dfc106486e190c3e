"""The space is exactly the layouts of a domain that keep every rule."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.layout import DEFAULTS, KNOBS, Layout, layout_from, min_gpus
from tuner.core.workload import Model
from tuner.rules.validity import RULES, broken_rules, valid_mask
from tuner.space.domain import Domain, default_domain, search_domain
from tuner.space.enumeration import BINDING_ORDER, Space, enumerate_layouts
from tuner.space.table import with_derived

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
SMALL_DOMAIN: Domain = {**GRIDS, **SWITCHES, "overlap_p2p_comm": (False, True)}


def layouts_of(table: pd.DataFrame) -> list[Layout]:
    return [layout_from(row) for row in table.to_dict("records")]  # type: ignore[arg-type]


def every_combination(domain: Domain) -> pd.DataFrame:
    """Every combination of a domain, valid or not, as a table with every knob."""
    rows = [dict(zip(domain, values, strict=True)) for values in product(*domain.values())]
    return pd.DataFrame([{**DEFAULTS, **row} for row in rows], columns=list(KNOBS))


@pytest.fixture(scope="module")
def default_space() -> Space:
    """The default domain of a small mixture of experts on 8 GPUs."""
    work = workload(mixture())
    return enumerate_layouts(work, cluster(8), default_domain(work, cluster(8)))


@pytest.mark.parametrize("domain", [GRIDS, SWITCHES], ids=["grids", "switches"])
@pytest.mark.parametrize("model", [dense(), mixture(num_layers=7)], ids=["dense", "mixture"])
def test_the_table_is_what_the_rules_leave_of_every_combination(model: Model, domain: Domain) -> None:
    work, gpus = workload(model), cluster(8)
    space = enumerate_layouts(work, gpus, domain)
    combinations = every_combination(domain)
    valid = valid_mask(combinations, work, gpus)
    assert set(layouts_of(space.table)) == set(layouts_of(combinations[valid]))
    assert len(space.table) == np.count_nonzero(valid) > 0
    assert sum(space.rejected.values()) == np.count_nonzero(~valid)
    assert set(space.rejected) <= {rule.id for rule in RULES}


@pytest.mark.parametrize("domain", [GRIDS, SWITCHES], ids=["grids", "switches"])
@pytest.mark.parametrize("model", [dense(), mixture(num_layers=7)], ids=["dense", "mixture"])
def test_one_layout_is_judged_as_its_row_of_a_table(model: Model, domain: Domain) -> None:
    work, gpus = workload(model), cluster(8)
    combinations = every_combination(domain)
    valid = combinations[valid_mask(combinations, work, gpus)]
    invalid = combinations[~valid_mask(combinations, work, gpus)]
    for layout in layouts_of(valid.sample(min(20, len(valid)), random_state=1)):
        assert not broken_rules(layout, work, gpus)
    for layout in layouts_of(invalid.sample(40, random_state=1)):
        assert broken_rules(layout, work, gpus)


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


def test_rows_come_back_as_the_layouts_they_are(default_space: Space) -> None:
    table = default_space.table
    assert tuple(table.columns) == KNOBS
    sample = table.sample(50, random_state=1)
    assert valid_mask(sample, workload(mixture()), cluster(8)).all()
    for index, row in zip(sample.index, sample.to_dict("records"), strict=True):
        layout = layout_from(row)  # type: ignore[arg-type]
        for knob, value in row.items():
            assert getattr(layout, str(knob)) == value == table.at[index, knob]
            assert type(getattr(layout, str(knob))) is type(DEFAULTS[str(knob)])


def test_every_knob_is_bound_once() -> None:
    assert sorted(BINDING_ORDER) == sorted(KNOBS)


def test_the_order_of_rows_depends_on_the_arguments_alone() -> None:
    work = workload(mixture())
    first, second = (enumerate_layouts(work, cluster(8), SMALL_DOMAIN) for _ in range(2))
    assert first.table.equals(second.table)
    shuffled = dict(reversed(list(SMALL_DOMAIN.items())))
    assert enumerate_layouts(work, cluster(8), shuffled).table.equals(first.table)


def test_columns_are_compact(default_space: Space) -> None:
    table = default_space.table
    assert table.dtypes["tp"] == np.int16
    assert table.dtypes["sp"] == np.bool_
    assert str(table.dtypes["recompute_granularity"]) == "category"


def test_a_fixed_knob_overrides_its_domain() -> None:
    space = enumerate_layouts(workload(dense()), cluster(8), SMALL_DOMAIN, fixed={"tp": 2, "sp": True})
    assert set(space.table.tp) == {2}
    assert set(space.table.sp) == {True}


def test_knobs_that_are_not_named_keep_their_default_and_p2p_overlap_follows_interleaving() -> None:
    table = enumerate_layouts(workload(dense()), cluster(8), {"pp": (1, 2, 4), "vpp": (1, 2)}).table
    assert set(table.use_distributed_optimizer) == {DEFAULTS["use_distributed_optimizer"]}
    assert set(table.tp) == {1}
    assert (table.overlap_p2p_comm == (table.vpp > 1)).all()
    assert set(table.vpp) == {1, 2}


def test_repeated_values_do_not_repeat_rows() -> None:
    assert len(enumerate_layouts(workload(dense()), cluster(8), {"tp": (2, 2, 2)}).table) == 1


def test_a_lifted_policy_lets_its_rows_in() -> None:
    work, narrow = workload(dense()), cluster(8, nvlink_domain_gpus=2)
    domain: Domain = {"tp": (1, 2, 4)}
    assert set(enumerate_layouts(work, narrow, domain).table.tp) == {1, 2}
    assert set(enumerate_layouts(work, narrow, domain, lifted={"tp-inside-nvlink"}).table.tp) == {1, 2, 4}


def test_nothing_valid_gives_an_empty_table_that_says_why() -> None:
    space = enumerate_layouts(workload(dense()), cluster(8), {"tp": (3,), "pp": (1, 2)})
    assert len(space.table) == 0
    assert tuple(space.table.columns) == KNOBS
    assert sum(space.rejected.values()) == space.combinations == 4


def layers_per_chunk(layout: Layout, num_layers: int) -> tuple[int, ...]:
    """The layers of each chunk, rank by rank, as Megatron's get_num_layers_to_build spreads them."""
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    embedding = layout.account_for_embedding_in_pipeline_split
    loss = layout.account_for_loss_in_pipeline_split
    unstated = layout.pp - (first > 0) - (last > 0)
    ranks = [(num_layers - first - last + embedding + loss) // max(unstated, 1)] * layout.pp
    ranks[0], ranks[-1] = first or ranks[0], last or ranks[-1]
    chunks = [size // layout.vpp for size in ranks for _ in range(layout.vpp)]
    chunks[0] -= embedding
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
    space = enumerate_layouts(work, cluster(12), domain, lifted={"uneven-split-balanced"})
    splits = [
        (layout.pp, layout.vpp, layers_per_chunk(layout, num_layers)) for layout in layouts_of(space.table)
    ]
    assert len(set(splits)) == len(splits) > len(domain["pp"])
    assert all(sum(chunks) == num_layers and min(chunks) >= 0 for _, _, chunks in splits)
