"""The domain says which values a knob may take; what can't be a value is refused by name."""

from typing import Any

import pytest

from tests.unit.layouts import cluster, dense, mixture, workload
from tuner.core.layout import KNOBS
from tuner.errors import InputError
from tuner.space.domain import candidates, default_domain, search_domain
from tuner.space.enumeration import enumerate_layouts


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
        candidates(domain)
    with pytest.raises(InputError, match=message):
        enumerate_layouts(workload(dense()), cluster(8), domain)


@pytest.mark.parametrize("model", [dense(), mixture()], ids=["dense", "mixture"])
def test_the_default_domain_names_every_knob_and_repeats_no_value(model: Any) -> None:
    domain = default_domain(workload(model), cluster(8))
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
    domain = {**search_domain(work, cluster(64)), "pp": (16,)}
    table = enumerate_layouts(work, cluster(64), domain).table
    first, last = table.num_layers_in_first_pipeline_stage, table.num_layers_in_last_pipeline_stage
    assert {(2, 3), (3, 2)} <= set(zip(first, last, strict=True))


def test_pipeline_sizes_leave_every_stage_something_to_hold() -> None:
    work = workload(dense(num_layers=6), global_batch_size=64)
    assert search_domain(work, cluster(48))["pp"] == (1, 2, 3, 4, 6, 8)
