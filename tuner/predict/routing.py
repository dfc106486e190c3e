"""How unevenly routers load the ranks of an expert parallel group, which decides their memory and the step time."""

from typing import Final, NamedTuple

import numpy as np
from scipy.special import ndtri  # type: ignore[import-untyped]

from tuner.core.columns import Columns, Floats
from tuner.core.workload import Workload

UNEVENNESS: Final = 0.6
"""Standard deviation of the experts' loads in a layer whose router is untrained, as a multiple of what it would be if
every token took the same experts. Measured in the first steps of trials on CPU with 4 to 8 layers, 8 to 64 experts and
top 2 to 8: 0.47 to 0.68 with hidden sizes of 512 and 1024, with softmax and with sigmoid; half of that with a hidden
size of 128. Nothing balances the loads in a trial: it has no auxiliary loss, since that would depend on the layout, and
it ends before such a loss could help."""


class Load(NamedTuple):
    """Tokens of the busiest rank divided by the mean of its expert parallel group, one value per layout."""

    kept: Floats
    """Ratio of the tokens summed over all layers of a stage, which decides the bytes of their saved activations."""
    worst: Floats
    """Ratio in the most unevenly loaded layer of a stage, which decides the bytes that one layer needs while it
    runs."""


def load_of_busiest(columns: Columns, workload: Workload) -> Load:
    """Return the expected load of the busiest rank in an expert parallel group, as a multiple of the mean load.

    It is 1 without experts, if routing is forced to be balanced, or if ep is 1. The loads of the experts are assumed to
    be independent between layers. If the loads of E experts have the standard deviation v, the mean load of the n
    experts of a rank has the standard deviation v * sqrt((1 - n/E) / n * E / (E - 1)). The largest of m normal values
    is expected at the quantile (m - 3/8) / (m + 1/4) (G. Blom, Statistical Estimates and Transformed Beta-Variables,
    1958). The load is limited, since a rank gets at most min(n, topk) copies of each token.
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


def _largest(count: Floats) -> Floats:
    """Return the expected value of the largest of `count` standard normal values; 0 for one value."""
    largest: Floats = np.maximum(ndtri((count - 0.375) / (count + 0.25)), 0.0)
    return largest
