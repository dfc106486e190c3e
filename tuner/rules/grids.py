"""Rules for the two ways to arrange the GPUs in a grid, pp*dp*cp*tp for dense layers and pp*edp*ep*etp for experts.

Both must fill the world, and tensor parallelism should stay inside an NVLink domain.
"""

from tuner.core.layout import Layout, min_gpus
from tuner.rules.rule import Rule, remainder, rule

PARALLEL_STATE = "megatron/core/parallel_state.py, initialize_model_parallel"
NVLINK_GUIDE = "Megatron Bridge, skills/perf-parallelism-strategies: keep TP within a single NVLink domain"


def _smallest_world(layout: Layout) -> str:
    gpus = min_gpus(layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
    return f"the smallest world for this layout is pp*max(tp*cp, ep*etp) = {gpus}"


def _dense_product(layout: Layout, world_size: int) -> str:
    name = f"tp*pp*cp = {layout.tp}*{layout.pp}*{layout.cp}"
    return remainder("world size", world_size, name, layout.tp * layout.pp * layout.cp)


def _expert_product(layout: Layout, world_size: int) -> str:
    name = f"pp*ep*etp = {layout.pp}*{layout.ep}*{layout.etp}"
    return remainder("world size", world_size, name, layout.pp * layout.ep * layout.etp)


RULES: tuple[Rule, ...] = (
    rule(
        "dense-grid",
        "megatron",
        "tp pp cp",
        holds=lambda columns, workload, cluster: (
            cluster.world_size % (columns["tp"] * columns["pp"] * columns["cp"]) == 0
        ),
        message=lambda layout, workload, cluster: (
            f"{_dense_product(layout, cluster.world_size)}: choose tp, pp and cp whose product divides the world size; "
            f"{_smallest_world(layout)}"
        ),
        source=PARALLEL_STATE,
    ),
    rule(
        "expert-grid",
        "megatron",
        "pp ep etp",
        holds=lambda columns, workload, cluster: (
            cluster.world_size % (columns["pp"] * columns["ep"] * columns["etp"]) == 0
        ),
        message=lambda layout, workload, cluster: (
            f"{_expert_product(layout, cluster.world_size)}: choose pp, ep and etp whose product divides the world "
            f"size; {_smallest_world(layout)}"
        ),
        source=PARALLEL_STATE,
    ),
    rule(
        "tp-inside-nvlink",
        "policy",
        "tp",
        holds=lambda columns, workload, cluster: cluster.nvlink_domain_gpus % columns["tp"] == 0,
        message=lambda layout, workload, cluster: (
            remainder("nvlink_domain_gpus", cluster.nvlink_domain_gpus, "tp", layout.tp)
            + ": a tensor-parallel group would leave its NVLink domain; lower tp, or lift this rule"
        ),
        source=NVLINK_GUIDE,
    ),
    rule(
        "etp-inside-nvlink",
        "policy",
        "etp",
        holds=lambda columns, workload, cluster: cluster.nvlink_domain_gpus % columns["etp"] == 0,
        message=lambda layout, workload, cluster: (
            remainder("nvlink_domain_gpus", cluster.nvlink_domain_gpus, "etp", layout.etp)
            + ": an expert-tensor-parallel group would leave its NVLink domain; lower etp, or lift this rule"
        ),
        source=NVLINK_GUIDE,
    ),
)
