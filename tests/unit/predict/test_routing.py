"""The load of the busiest expert parallel rank that is expected of an untrained router."""

from typing import Any

import numpy as np
import pytest

from tests.unit.layouts import dense, mixture, workload
from tuner.core.columns import Columns
from tuner.core.layout import Layout
from tuner.core.workload import Model, Workload
from tuner.predict.routing import UNEVENNESS, Load, load_of_busiest


def of_experts(experts: int, topk: int, layers: int) -> Model:
    return mixture(num_moe_experts=experts, moe_router_topk=topk, num_layers=layers)


def load(of: Workload, **knobs: Any) -> tuple[float, float]:
    """Return the load that decides what layers keep, and the load that decides what one layer needs."""
    expected = load_of_busiest(Columns.single(Layout(**knobs)), of)
    return float(expected.kept[0]), float(expected.worst[0])


def drawn(experts: int, topk: int, layers: int, ep: int) -> Load:
    """Return the mean over many draws of independent loads with the deviation that UNEVENNESS states."""
    random = np.random.default_rng(0)
    loads = random.normal(size=(4000, layers, experts))
    loads -= loads.mean(axis=2, keepdims=True)
    loads *= UNEVENNESS * np.sqrt(experts / topk - 1) / np.sqrt(1 - 1 / experts)
    of_rank = 1 + loads.reshape(4000, layers, ep, -1).mean(axis=3)
    return Load(of_rank.mean(axis=1).max(axis=1).mean(), of_rank.max(axis=(1, 2)).mean())


@pytest.mark.parametrize(("experts", "topk", "layers", "ep"), [(64, 8, 6, 8), (64, 8, 4, 4), (128, 8, 16, 8)])
def test_the_expected_load_is_the_mean_of_many_draws(experts: int, topk: int, layers: int, ep: int) -> None:
    kept, worst = load(workload(of_experts(experts, topk, layers)), ep=ep)
    expected = drawn(experts, topk, layers, ep)
    assert kept == pytest.approx(expected.kept, rel=0.03)
    assert worst == pytest.approx(expected.worst, rel=0.06)


# Experts, topk and layers; ep; and the mean load of the busiest of ep ranks over four steps of a trial on CPU.
MEASURED = (((16, 4, 8), 8, 1.41), ((64, 8, 6), 8, 1.36), ((64, 8, 4), 8, 1.41), ((16, 4, 8), 4, 1.30))


@pytest.mark.parametrize(("of", "ep", "measured"), MEASURED)
def test_the_expected_load_is_near_that_of_untrained_routers(
    of: tuple[int, int, int], ep: int, measured: float
) -> None:
    assert load(workload(of_experts(*of)), ep=ep)[0] == pytest.approx(measured, abs=0.15)


def test_loads_are_even_if_each_rank_has_all_experts_or_routing_is_forced() -> None:
    assert load(workload(dense())) == (1, 1)
    assert load(workload(mixture())) == (1, 1)
    forced = workload(mixture(), moe_router_force_load_balancing=True)
    assert load(forced, ep=4) == (1, 1)


def test_more_ranks_are_less_even_and_no_rank_has_more_than_all_tokens() -> None:
    loads = [load(workload(of_experts(64, 8, 4)), ep=ep) for ep in (1, 2, 4, 8, 16, 32, 64)]
    assert loads == sorted(loads)
    assert all(kept <= worst <= ep for (kept, worst), ep in zip(loads, (1, 2, 4, 8, 16, 32, 64), strict=True))
    one_expert_each = load(workload(of_experts(64, 8, 4)), ep=64)
    assert one_expert_each[1] <= 64 / 8
