"""The guide's tables as data: they are those of the published document, and its examples hold."""

import re
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from search_spaces.loader import load_model
from tests.unit.layouts import cluster, workload
from tuner.core.layout import Layout, data_parallel_size, expert_data_parallel_size, min_gpus
from tuner.rules.validity import RULES, broken_rules
from tuner.space.guide import MinimumGpus, Pitfall, Scaling, read_guide

GUIDE = read_guide()
PUBLISHED = Path(__file__).parents[4] / "shared" / "seed" / "parallelism-strategies.md"


def published_rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the guide."""
    if not PUBLISHED.is_file():
        pytest.skip(f"the guide is not beside this checkout ({PUBLISHED})")
    section = PUBLISHED.read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    lines = section[section.index("|") :].split("\n\n")[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def stated_range(knob: str, advice: str) -> tuple[int, int]:
    """The range that a piece of advice states for a knob, such as `TP=2-4`; 1 to 1 if it states none."""
    stated = re.search(rf"{knob.upper()}=([\d-]+)", advice)
    numbers = numbers_in(stated[1]) if stated else [1]
    return numbers[0], numbers[-1]


def test_dense_rows_are_those_of_the_guide() -> None:
    published = published_rows("Dense models")
    assert [row.name for row in GUIDE.dense] == [cells[0] for cells in published]
    for row, (size, gpus, advice) in zip(GUIDE.dense, published, strict=True):
        bounds = numbers_in(size)
        assert row.parameters_billions == (tuple(bounds) if len(bounds) == 2 else (0, bounds[0]))
        assert row.gpus == tuple(numbers_in(gpus))
        for knob in ("tp", "pp", "cp"):
            assert getattr(row, knob) == stated_range(knob, advice)


def test_moe_rows_are_those_of_the_guide() -> None:
    published = published_rows("MoE models")
    assert [row.name for row in GUIDE.moe] == [cells[0] for cells in published]
    for row, (name, tp, pp, ep, note) in zip(GUIDE.moe, published, strict=True):
        assert (row.tp, row.pp, row.ep) == (int(tp), int(pp), int(ep))
        assert row.cp == (2 if "CP=2" in note else 1)
        sizes = [float(size) for size in re.findall(r"([\d.]+)B", name)]
        assert sizes in ([row.total_billions, row.active_billions], [])


def test_sequence_rows_are_those_of_the_guide() -> None:
    published = published_rows("Decision by Sequence Length")
    assert [row.name for row in GUIDE.sequence] == [cells[0] for cells in published]
    assert [row.from_tokens for row in GUIDE.sequence] == [0, 2 * 1024, 8 * 1024, 32 * 1024]
    for row, (_, advice) in zip(GUIDE.sequence, published, strict=True):
        assert row.cp == stated_range("cp", advice)


def test_minimum_gpu_examples_are_those_of_the_guide() -> None:
    published = published_rows("Examples")
    for row, (sizes, wrong, correct) in zip(GUIDE.minimum_gpus, published, strict=True):
        assert [row.pp, row.tp, row.cp, row.ep, row.etp] == numbers_in(sizes)
        assert (row.wrong_product, row.correct) == (int(wrong), numbers_in(correct)[0])


def test_rows_leave_no_gap_and_their_names_no_separator() -> None:
    bounds = [row.parameters_billions for row in GUIDE.dense]
    assert bounds[0][0] == 0
    assert all(lower[1] == upper[0] for lower, upper in pairwise(bounds))
    starts = [row.from_tokens for row in GUIDE.sequence]
    assert starts == sorted(starts) and starts[0] == 0
    tables = (GUIDE.dense, GUIDE.moe, GUIDE.topology, GUIDE.sequence, GUIDE.recipes)
    names = [row.name for rows in tables for row in rows]
    assert not [name for name in names if "; " in name or " + " in name]


@pytest.mark.parametrize("example", GUIDE.minimum_gpus, ids=str)
def test_the_fewest_gpus_are_not_the_product_of_all_sizes(example: MinimumGpus) -> None:
    sizes = {name: getattr(example, name) for name in ("pp", "tp", "cp", "ep", "etp")}
    assert min_gpus(sizes["tp"], sizes["pp"], sizes["cp"], sizes["ep"], sizes["etp"]) == example.correct
    assert prod(sizes.values()) == example.wrong_product > example.correct
    # The rules agree: the grids fit the right number of GPUs, and no smaller one.
    layout, work = Layout(**sizes, sp=True), workload(load_model("olmoe-7b"))
    for gpus, fits in ((example.correct, True), (example.correct // 2, False)):
        broken = {violation.rule for violation in broken_rules(layout, work, cluster(gpus))}
        assert bool(broken & {"dense-grid", "expert-grid"}) is not fits


@pytest.mark.parametrize("example", GUIDE.scaling, ids=lambda example: f"{example.gpus} GPUs")
def test_more_gpus_scale_both_data_parallel_sizes(example: Scaling) -> None:
    assert data_parallel_size(example.gpus, example.tp, example.pp, example.cp) == example.dp
    assert expert_data_parallel_size(example.gpus, example.pp, example.ep, example.etp) == example.edp


def test_the_memory_example_adds_up_but_leaves_out_the_fp32_state_of_mixed_precision() -> None:
    example = GUIDE.memory
    whole, share = example.whole_gb, example.per_gpu_gb
    assert whole.parameters == example.parameters_billions * 2  # FP16
    assert whole.gradients == example.parameters_billions * 2
    assert whole.optimizer == example.parameters_billions * 4  # two FP16 moments
    for name in ("parameters", "gradients", "optimizer", "activations", "total"):
        assert getattr(share, name) == getattr(whole, name) / (example.tp * example.pp)
    for parts in (whole, share):
        assert parts.total == parts.parameters + parts.gradients + parts.optimizer + parts.activations
    # Megatron without the distributed optimizer holds 18 bytes per parameter (weight 2, FP32 gradient 4, FP32 master
    # copy and moments 12: Megatron-LM, training/theoretical_memory_usage.py); the guide counts 8.
    bytes_per_parameter = (whole.total - whole.activations) / example.parameters_billions
    assert bytes_per_parameter == 8
    assert 18 * example.parameters_billions / (example.tp * example.pp) > 2 * share.total
    # The example uses 64 GPUs, and shards nothing over the 4 data-parallel ranks among them.
    assert example.tp * example.pp * example.dp == 64


PITFALL_LAYOUTS = {
    1: (Layout(tp=16, sp=True), "llama3-8b"),
    3: (Layout(sp=True), "llama3-8b"),
    4: (Layout(cp=4), "llama3-8b"),
    5: (Layout(ep=2), "llama3-8b"),
    8: (Layout(pp=2, ep=32), "olmoe-7b"),
}
"""By a pitfall's number: a layout that falls into it, and the model that it is for."""


@pytest.mark.parametrize("pitfall", GUIDE.pitfalls, ids=lambda pitfall: f"pitfall {pitfall.number}")
def test_a_pitfall_is_refused_by_the_rules_it_names(pitfall: Pitfall) -> None:
    assert set(pitfall.rules) <= {rule.id for rule in RULES}
    assert bool(pitfall.rules) == (pitfall.number in PITFALL_LAYOUTS)
    if pitfall.rules:
        layout, model = PITFALL_LAYOUTS[pitfall.number]
        work, nodes = workload(load_model(model), seq_length=4100), cluster(8, nodes=4)
        assert {broken.rule for broken in broken_rules(layout, work, nodes)} & set(pitfall.rules)
