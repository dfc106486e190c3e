"""The seeds that follow from the guide: each row of it is reproduced if it fits, and otherwise moved to the nearest."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import log2

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.loader import load_cluster, load_model
from tests.unit.layouts import cluster
from tuner.core.cluster import Cluster
from tuner.core.layout import KNOBS, Layout, layout_from, min_gpus
from tuner.core.workload import Model, Workload
from tuner.rules.validity import broken_rules, valid_mask
from tuner.space.domain import Value, search_domain
from tuner.space.enumeration import enumerate_layouts
from tuner.space.guide import DenseRow, MoeRow, Range, read_guide
from tuner.space.heuristics import GRID_WEIGHTS, Seed, seeds

GUIDE = read_guide()
DENSE_MODELS = {
    "< 1B": "qwen3-0.6b",
    "1-10B": "llama3-8b",
    "10-70B": "qwen3-32b",
    "70-175B": "llama3-70b",
    "175-500B": "llama3.1-405b",
}
TINY_MODELS = ("tiny-gpt", "tiny-moe", "tiny-mla")

built_in = cache(load_model)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A built-in model on GPUs like the H100."""

    model: str
    gpus: int
    gpus_per_node: int = 8
    nvlink_domain_gpus: int | None = None
    """None is a node."""
    fabric_gb_per_s: float = 50.0
    seq_length: int = 4096
    global_batch_size: int = 2048

    def workload(self) -> Workload:
        return Workload(
            model=built_in(self.model),
            seq_length=self.seq_length,
            global_batch_size=self.global_batch_size,
        )

    def cluster(self) -> Cluster:
        return cluster(
            self.gpus_per_node,
            nodes=self.gpus // self.gpus_per_node,
            nvlink_domain_gpus=self.nvlink_domain_gpus or self.gpus_per_node,
            fabric_bandwidth_gb_per_s=self.fabric_gb_per_s,
        )


def searched_table(work: Workload, machines: Cluster) -> pd.DataFrame:
    return enumerate_layouts(work, machines, search_domain(work, machines)).table


@cache
def table_of(setting: Setting) -> pd.DataFrame:
    return searched_table(setting.workload(), setting.cluster())


@cache
def seeds_of(setting: Setting) -> tuple[Seed, ...]:
    return seeds(setting.workload(), setting.cluster(), table_of(setting))


def grid(layout: Layout) -> tuple[int, int, int, int]:
    return layout.tp, layout.pp, layout.cp, layout.ep


def doublings(sizes: Range) -> list[int]:
    low, high = sizes
    return [low * 2**power for power in range(high.bit_length()) if low * 2**power <= high]


def from_row(all_seeds: tuple[Seed, ...], name: str) -> list[Seed]:
    """The seeds that a row led to without a move."""

    def sources(seed: Seed) -> list[str]:
        return [source.split(" + ")[0] for source in seed.source.split("; ")]

    return [seed for seed in all_seeds if any(source.endswith(f": {name}") for source in sources(seed))]


def on_fewest_gpus(row: MoeRow) -> Setting:
    """The model of a row, on the fewest GPUs that hold the row's layout."""
    return Setting(model=row.model, gpus=int(min_gpus(row.tp, row.pp, row.cp, row.ep, 1)))


DEEPSEEK_V2 = Setting(model="deepseek-v2", gpus=128)
LLAMA_8B = Setting(model="llama3-8b", gpus=8)
LLAMA_70B = Setting(model="llama3-70b", gpus=64)
QWEN_32B = Setting(model="qwen3-32b", gpus=64)


# Every row is reproduced if it fits.


@pytest.mark.parametrize("row", GUIDE.moe, ids=lambda row: row.model)
def test_a_named_moe_model_starts_at_its_row_on_the_fewest_gpus_that_hold_it(row: MoeRow) -> None:
    first = seeds_of(on_fewest_gpus(row))[0]
    assert grid(first.layout) == (row.tp, row.pp, row.cp, row.ep)
    assert first.source.startswith(f"MoE models: {row.name}")
    assert "moved" not in first.note
    assert first.layout.sp is (row.tp > 1)


@pytest.mark.parametrize("row", GUIDE.moe, ids=lambda row: row.model)
def test_an_unknown_moe_model_takes_the_row_nearest_in_size(row: MoeRow) -> None:
    setting = on_fewest_gpus(row)
    stranger: Model = replace(built_in(row.model), name="my-own")
    # A model's name decides nothing about which layouts are valid, so the table of the named model serves.
    work = replace(setting.workload(), model=stranger)
    first = seeds(work, setting.cluster(), table_of(setting))[0]
    assert grid(first.layout) == (row.tp, row.pp, row.cp, row.ep)
    assert f"nearest in size, {row.name}" in first.source


@pytest.mark.parametrize("row", GUIDE.dense, ids=lambda row: row.name)
def test_a_dense_model_gets_every_step_of_its_row(row: DenseRow) -> None:
    all_seeds = seeds_of(Setting(model=DENSE_MODELS[row.name], gpus=row.gpus[1]))
    steps = set(product(doublings(row.tp), doublings(row.pp), doublings(row.cp), [1]))
    assert {grid(seed.layout) for seed in from_row(all_seeds, row.name)} == steps
    assert grid(all_seeds[0].layout) in steps


def test_a_larger_model_takes_the_upper_end_of_its_row() -> None:
    small = seeds_of(Setting(model="qwen3-14b", gpus=64))[0].layout
    large = seeds_of(QWEN_32B)[0].layout
    assert (small.tp, small.pp) == (4, 2)
    assert (large.tp, large.pp) == (8, 4)


def test_a_size_rounded_across_a_boundary_gets_both_rows() -> None:
    sources = " ".join(seed.source for seed in seeds_of(LLAMA_70B))
    assert "Dense models: 70-175B" in sources and "Dense models: 10-70B" in sources
    larger = seeds_of(Setting(model="gpt3-175b", gpus=64, seq_length=2048))
    assert "Dense models: 10-70B" not in " ".join(seed.source for seed in larger)


@pytest.mark.parametrize(
    ("setting", "row", "tp", "least_pp"),
    [
        (LLAMA_8B, "single node with NVLink", 8, 1),
        (
            Setting(model="llama3-8b", gpus=32, gpus_per_node=4, nvlink_domain_gpus=32),
            "single node with NVLink",
            8,
            1,
        ),
        (Setting(model="llama3-8b", gpus=32), "nodes with InfiniBand", 8, 2),
        (Setting(model="llama3-8b", gpus=32, fabric_gb_per_s=1.25), "limited network (Ethernet)", 4, 2),
    ],
)
def test_the_network_decides_a_seed_of_a_dense_model(
    setting: Setting, row: str, tp: int, least_pp: int
) -> None:
    (seed,) = from_row(seeds_of(setting), row)
    assert (seed.layout.tp, seed.layout.pp) == (tp, least_pp)


@pytest.mark.parametrize(
    ("seq_length", "sp", "first_cp", "also_cp"),
    [
        (1024, False, 1, []),
        (2048, True, 1, []),
        (4096, True, 1, []),
        (8192, True, 2, [1]),
        (16384, True, 2, [1]),
        (32768, True, 4, [8, 1]),
    ],
)
def test_the_sequence_length_adds_sp_and_cp(
    seq_length: int, sp: bool, first_cp: int, also_cp: list[int]
) -> None:
    all_seeds = seeds_of(Setting(model="llama3-8b", gpus=64, seq_length=seq_length, global_batch_size=64))
    assert all_seeds[0].layout.cp == first_cp
    cp_sizes = {seed.layout.cp for seed in all_seeds if seed.layout.tp == 4 and seed.layout.pp == 1}
    assert cp_sizes >= set(also_cp)
    assert all(seed.layout.sp is (sp and seed.layout.tp > 1) for seed in all_seeds)


def test_the_combined_recipes_for_dense_models_follow_what_is_in_use() -> None:
    three_d = from_row(seeds_of(QWEN_32B), "3D (TP, PP, DP)")
    assert [grid(seed.layout) for seed in three_d] == [(4, 4, 1, 1)]
    large = seeds_of(Setting(model="llama3.1-405b", gpus=512, seq_length=8192))
    assert [grid(seed.layout) for seed in from_row(large, "4D (TP, PP, CP, DP)")] == [(8, 8, 2, 1)]
    small = seeds_of(Setting(model="qwen3-0.6b", gpus=8))
    assert not [seed for seed in small if "Combined" in seed.source]


def test_deepseek_v2_on_128_gpus_is_the_combined_recipe() -> None:
    first = seeds_of(DEEPSEEK_V2)[0]
    assert grid(first.layout) == (1, 4, 1, 32)
    assert "EP and PP, DeepSeek-V2 on 128 GPUs" in first.source
    assert first.layout.sp is False


def test_deepseek_v3_on_256_gpus_moves_as_the_guide_contradicts_its_own_minimum() -> None:
    recipe = next(recipe for recipe in GUIDE.recipes if recipe.model == "deepseek-v3")
    assert recipe.gpus == 256 < min_gpus(recipe.tp, recipe.pp, recipe.cp, recipe.ep, 1) == 1024
    first = seeds_of(Setting(model="deepseek-v3", gpus=256))[0]
    # Megatron Bridge ships this grid for 256 GPUs: recipes/deepseek, deepseek_v3_pretrain_config_32nodes.
    assert grid(first.layout) == (2, 8, 1, 32)
    assert first.note.startswith("guide says tp=2 pp=16 ep=64 sp, but world size (256) % ")
    assert "moved to tp=2 pp=8 ep=32 sp" in first.note
    assert first.source.endswith("small TP, PP and EP, DeepSeek-V3 on 256 GPUs (moved)")


def test_experts_spread_over_one_gpu_each_where_they_fit() -> None:
    all_seeds = seeds_of(Setting(model="mixtral-8x7b", gpus=32))
    (pattern,) = [seed for seed in all_seeds if "Key patterns" in seed.source]
    assert (pattern.layout.ep, pattern.layout.etp) == (8, 1)
    assert "EP = 8/1" in pattern.source


# A seed spares memory, and interleaves.


def test_a_seed_starts_with_one_sample_selective_recompute_and_virtual_stages() -> None:
    for seed in seeds_of(LLAMA_70B):
        assert seed.layout.micro_batch_size == 1
        assert seed.layout.recompute_granularity == "selective"
        assert (seed.layout.vpp > 1) == (seed.layout.pp > 1)


def test_a_seed_interleaves_by_more_chunks_where_two_do_not_divide_a_stage() -> None:
    first = seeds_of(DEEPSEEK_V2)[0]
    assert first.layout.vpp == 3  # 60 layers over 4 stages: 15 each
    assert first.note == ""


def test_a_seed_interleaves_however_many_chunks_that_takes() -> None:
    work, machines = QWEN_32B.workload(), QWEN_32B.cluster()
    work = replace(work, model=replace(work.model, num_layers=100))
    first = seeds(work, machines, searched_table(work, machines))[0]
    assert (first.layout.pp, first.layout.vpp) == (4, 5)  # 25 layers each
    assert first.note == ""


def test_a_seed_says_where_no_virtual_stages_fit() -> None:
    setting = Setting(model="deepseek-v3", gpus=1024)
    assert seeds_of(setting)[0].note == "no virtual stages fit pp=16 here"
    table = table_of(setting)
    on_grid = (table[["tp", "pp", "cp", "ep", "etp"]] == [2, 16, 1, 64, 1]).all(axis=1)
    assert on_grid.any() and not (table[on_grid]["vpp"] > 1).any()


# A layout that isn't in the table is moved.


def test_a_move_names_the_rule_with_its_numbers() -> None:
    machines = load_cluster("cpu-4")
    work = Workload(model=built_in("tiny-moe"), seq_length=128, global_batch_size=16, precision="fp32")
    first = seeds(work, machines, searched_table(work, machines))[0]
    assert grid(first.layout) == (1, 1, 1, 4)
    assert first.note == (
        "guide says tp=1 pp=1 ep=8, but world size (4) % (pp*ep*etp = 1*8*1 = 8) = 4, must be 0: "
        "moved to tp=1 pp=1 ep=4, the nearest valid"
    )


def test_a_layout_that_is_valid_but_not_searched_is_moved_and_said_so() -> None:
    table = table_of(LLAMA_8B)
    first = seeds(LLAMA_8B.workload(), LLAMA_8B.cluster(), table[table["tp"] == 2])[0]
    assert first.layout.tp == 2
    assert first.note == (
        "guide says tp=4 pp=1 sp, but it is not among the layouts searched: "
        "moved to tp=2 pp=1 sp, the nearest valid"
    )


def test_of_two_layouts_as_near_the_one_with_fewer_pipeline_stages_is_taken() -> None:
    # The row is tp=1 pp=4 ep=8 for 32 GPUs; on 16, pp=2 ep=8 and pp=4 ep=4 are one halving away each.
    first = seeds_of(Setting(model="glm-4.5-air", gpus=16))[0]
    assert grid(first.layout) == (1, 2, 1, 8)


def test_sources_that_lead_to_one_layout_are_named_together() -> None:
    sources = seeds_of(DEEPSEEK_V2)[0].source.split("; ")
    assert len(sources) == len(set(sources)) >= 3


def test_an_empty_table_gives_no_seeds() -> None:
    assert seeds(LLAMA_8B.workload(), LLAMA_8B.cluster(), table_of(LLAMA_8B).iloc[:0]) == ()


def test_a_row_is_the_label_of_a_filtered_table() -> None:
    table = table_of(LLAMA_8B)
    filtered = table[table["tp"] > 1]
    for seed in seeds(LLAMA_8B.workload(), LLAMA_8B.cluster(), filtered):
        assert layout_from({name: table.at[seed.row, name] for name in KNOBS}) == seed.layout


settings_of_any_size = st.builds(
    lambda nodes, gpus_per_node, **fields: Setting(
        gpus=nodes * gpus_per_node, gpus_per_node=gpus_per_node, **fields
    ),
    nodes=st.sampled_from([1, 2, 3, 4, 8]),
    gpus_per_node=st.sampled_from([1, 2, 4, 6, 8]),
    model=st.sampled_from(
        [*TINY_MODELS, "llama3-8b", "llama3-70b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"]
    ),
    seq_length=st.sampled_from([128, 2048, 8192, 32768]),
    global_batch_size=st.sampled_from([24, 64, 96]),
)


@settings(max_examples=60, deadline=None)
@given(setting=settings_of_any_size)
def test_seeds_are_valid_unique_rows_of_the_table(setting: Setting) -> None:
    work, machines = setting.workload(), setting.cluster()
    table = searched_table(work, machines)
    all_seeds = seeds(work, machines, table)
    assert bool(all_seeds) == (not table.empty)
    assert len({seed.row for seed in all_seeds}) == len(all_seeds)
    rows = table.iloc[[seed.row for seed in all_seeds]]
    assert [layout_from(row) for row in rows.to_dict("records")] == [seed.layout for seed in all_seeds]  # type: ignore[arg-type]
    assert valid_mask(rows, work, machines).all()
    assert all(seed.source for seed in all_seeds)


@pytest.mark.parametrize("setting", [LLAMA_70B, DEEPSEEK_V2], ids=["dense", "mixture"])
def test_seeds_come_in_a_fixed_order(setting: Setting) -> None:
    assert seeds(setting.workload(), setting.cluster(), table_of(setting)) == seeds_of(setting)


WITHOUT_RECOMPUTE: dict[str, Value] = {
    "recompute_granularity": "none",
    "recompute_method": "none",
    "recompute_num_layers": 0,
}


@settings(max_examples=40, deadline=None)
@given(
    row=st.sampled_from(GUIDE.moe),
    nodes=st.sampled_from([1, 2, 3, 4, 8]),
    gpus_per_node=st.sampled_from([1, 2, 4, 6, 8]),
)
def test_a_moved_seed_is_as_near_as_any_layout_of_the_table(
    row: MoeRow, nodes: int, gpus_per_node: int
) -> None:
    setting = Setting(
        model=row.model, gpus=nodes * gpus_per_node, gpus_per_node=gpus_per_node, global_batch_size=96
    )
    work, machines = setting.workload(), setting.cluster()
    domain = search_domain(work, machines)
    table = enumerate_layouts(work, machines, domain, fixed=WITHOUT_RECOMPUTE).table
    wanted = {"tp": row.tp, "pp": row.pp, "cp": row.cp, "ep": row.ep, "etp": 1}

    def apart(sizes: dict[str, int]) -> float:
        return sum(
            weight * (log2(sizes[name]) - log2(wanted[name])) ** 2 for name, weight in GRID_WEIGHTS.items()
        )

    grids = table[list(GRID_WEIGHTS)].drop_duplicates().to_dict("records")
    if not grids:
        assert not seeds(work, machines, table)
        return
    first = seeds(work, machines, table)[0]
    nearest = min(apart({str(name): size for name, size in sizes.items()}) for sizes in grids)
    assert apart({name: getattr(first.layout, name) for name in GRID_WEIGHTS}) == pytest.approx(nearest)
    assert ("guide says" in first.note) == (nearest > 0)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_the_models_for_cpu_ranks_get_seeds_on_four_of_them(model: str) -> None:
    machines = load_cluster("cpu-4")
    work = Workload(model=built_in(model), seq_length=128, global_batch_size=16, precision="fp32")
    all_seeds = seeds(work, machines, searched_table(work, machines))
    assert all_seeds
    assert all(broken_rules(seed.layout, work, machines) == () for seed in all_seeds)
    if not work.model.is_moe:
        assert grid(all_seeds[0].layout) == (1, 1, 1, 1)
