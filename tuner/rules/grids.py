"""The two device grids of a pipeline stage, and the domain that tensor parallelism should stay in."""

from tuner.core.layout import Layout, min_gpus
from tuner.rules.rule import Rule, remainder, rule

PARALLEL_STATE = "megatron/core/parallel_state.py, initialize_model_parallel"


def _smallest(x: Layout) -> str:
    return (
        "the smallest world for this layout is pp*max(tp*cp, ep*etp) = "
        f"{min_gpus(x.tp, x.pp, x.cp, x.ep, x.etp)}"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "dense-grid",
        "megatron",
        "tp pp cp",
        holds=lambda c, w, k: k.world_size % (c["tp"] * c["pp"] * c["cp"]) == 0,
        message=lambda x, w, k: (
            remainder("world size", k.world_size, f"tp*pp*cp = {x.tp}*{x.pp}*{x.cp}", x.tp * x.pp * x.cp)
            + f": choose tp, pp and cp whose product divides the world size; {_smallest(x)}"
        ),
        source=PARALLEL_STATE,
    ),
    rule(
        "expert-grid",
        "megatron",
        "pp ep etp",
        holds=lambda c, w, k: k.world_size % (c["pp"] * c["ep"] * c["etp"]) == 0,
        message=lambda x, w, k: (
            remainder("world size", k.world_size, f"pp*ep*etp = {x.pp}*{x.ep}*{x.etp}", x.pp * x.ep * x.etp)
            + f": choose pp, ep and etp whose product divides the world size; {_smallest(x)}"
        ),
        source=PARALLEL_STATE,
    ),
    rule(
        "tp-inside-nvlink",
        "policy",
        "tp",
        holds=lambda c, w, k: k.nvlink_domain_gpus % c["tp"] == 0,
        message=lambda x, w, k: (
            remainder("nvlink_domain_gpus", k.nvlink_domain_gpus, "tp", x.tp)
            + ": a tensor-parallel group would leave its NVLink domain; lower tp, or lift this rule"
        ),
        source="Megatron Bridge, skills/perf-parallelism-strategies: keep TP within a single NVLink domain",
    ),
    rule(
        "etp-inside-nvlink",
        "policy",
        "etp",
        holds=lambda c, w, k: k.nvlink_domain_gpus % c["etp"] == 0,
        message=lambda x, w, k: (
            remainder("nvlink_domain_gpus", k.nvlink_domain_gpus, "etp", x.etp)
            + ": an expert-tensor-parallel group would leave its NVLink domain; lower etp, or lift this rule"
        ),
        source="Megatron Bridge, skills/perf-parallelism-strategies: keep TP within a single NVLink domain",
    ),
)
