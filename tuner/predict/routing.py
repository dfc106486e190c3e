"""How uneven routers load the ranks of an expert parallel group, which decides their memory."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]

from tuner.core.columns import Columns
from tuner.core.workload import Workload

Floats = NDArray[np.float64]

UNEVENNESS: Final = 0.6
"""Deviation of the experts' loads in a layer whose router is untrained, as a share of what it would be if every token
took the same experts. Measured in the first steps of trials on CPU, 4 to 8 layers, 8 to 64 experts, top 2 to 8: 0.47 to
0.68 with hidden sizes of 512 and 1024, softmax and sigmoid alike, half of it in models of 128. Nothing balances it: a
trial has no auxiliary loss, which would depend on the layout, and is over before one could help."""


class Load(NamedTuple):
    """Tokens of the busiest rank over the mean of its expert parallel group; 1 is balanced."""

    kept: Floats
    """Over all layers of a stage: what they keep adds up."""
    worst: Floats
    """In the worst of its layers: what one layer needs at a time."""


def load_of_busiest(columns: Columns, workload: Workload) -> Load:
    """The load that is to be expected of a layout's busiest rank; 1 where routing is forced to be balanced, or ep is 1.

    Loads of the experts are taken as independent between layers: of E experts with deviation v, the mean over the n
    of a rank deviates by v * sqrt((1 - n/E) / n * E / (E - 1)), and the largest of m normal values is expected where
    their distribution is (m - 3/8) / (m + 1/4) (G. Blom, Statistical Estimates and Transformed Beta-Variables, 1958).
    No rank gets more than all tokens that its experts could take.
    """
    model, ep = workload.model, columns["ep"].astype(np.float64)
    if not model.num_moe_experts or not model.moe_router_topk or workload.moe_router_force_load_balancing:
        return Load(np.ones_like(ep), np.ones_like(ep))
    experts, local = model.num_moe_experts, model.num_moe_experts / ep
    deviation = UNEVENNESS * np.sqrt(experts / model.moe_router_topk - 1)
    of_rank = deviation * np.sqrt((1 - local / experts) / local * experts / max(experts - 1, 1))
    layers = np.maximum(sum(model.moe_layer_pattern()) / columns["pp"], 1)
    most = ep * np.minimum(local / model.moe_router_topk, 1)
    kept = 1 + of_rank / np.sqrt(layers) * _largest(ep)
    worst = 1 + of_rank * _largest(ep * layers)
    return Load(np.minimum(kept, most), np.minimum(worst, most))


def _largest(of: Floats) -> Floats:
    """The largest of so many standard normal values, as it is expected; 0 of one."""
    largest: Floats = np.maximum(ndtri((of - 0.375) / (of + 0.25)), 0.0)
    return largest
