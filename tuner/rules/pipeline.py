"""How the layers spread over pipeline stages and their chunks."""

import numpy as np

from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.stages import accounted_slots, stage_slots, unstated_stages
from tuner.core.workload import Workload
from tuner.rules.placement import TEXT
from tuner.rules.rule import Rule, remainder, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG

BLOCK = "megatron/core/transformer/transformer_block.py, get_num_layers_to_build"
UNEVEN = "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage"
ACCOUNT = "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
SPLIT = f"pp {UNEVEN} {ACCOUNT}"


def _uneven(c: Columns) -> Bools:
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    return (first > 0) | (last > 0)


def _accounts(c: Columns) -> Bools:
    return c.on("account_for_embedding_in_pipeline_split") | c.on("account_for_loss_in_pipeline_split")


def _even_split(c: Columns, w: Workload) -> Bools:
    even = (w.model.num_layers + accounted_slots(c)) % c["pp"] == 0
    holds: Bools = _uneven(c) | even | ~c.among(TEXT, "none")
    return holds


def _rest_fits(c: Columns, w: Workload) -> Bools:
    """The layers left go evenly, and at least one a stage, onto the stages left, or both are none."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    rest, stages = w.model.num_layers - first - last, unstated_stages(c)
    spread = (stages > 0) & (rest > 0) & (rest % np.maximum(stages, 1) == 0)
    holds: Bools = ~_uneven(c) | spread | ((stages == 0) & (rest == 0))
    return holds


def _chunks_even(c: Columns, w: Workload) -> Bools:
    slots = stage_slots(c, w)
    middle = np.where(unstated_stages(c) > 0, slots.middle % c["vpp"], 0)
    whole = slots.first % c["vpp"] + slots.last % c["vpp"] + middle == 0
    holds: Bools = (c["pp"] == 1) | whole | ~c.among(TEXT, "none")
    return holds


def _says_something(c: Columns, w: Workload) -> Bools:
    """A stated stage differs from what it would get unstated; of two stages only the first is stated."""
    first, last = c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"]
    middle, stages = stage_slots(c, w).middle, unstated_stages(c)
    repeats = (stages > 0) & ((first == middle) | (last == middle))
    holds: Bools = ~_uneven(c) | ~(repeats | ((c["pp"] == 2) & (last > 0)))
    return holds


def _not_as_accounted(c: Columns, w: Workload) -> Bools:
    """Without chunks, one layer less on an outer stage is what account_for_* spells."""
    slots = stage_slots(c, w)
    first, last = slots.middle - slots.first, slots.middle - slots.last
    # With two stages the stated first one leaves `middle` to the last: one less here is one more there.
    outer = np.isin(first, (0, 1)) & np.isin(last, (0, 1)) & (first + last > 0)
    two = (c["pp"] == 2) & (np.abs(first) == 1)
    holds: Bools = ~_uneven(c) | (c["vpp"] > 1) | (c["pp"] == 1) | (unstated_stages(c) == 0) | ~(outer | two)
    return holds


def _balanced(c: Columns, w: Workload) -> Bools:
    """No outer stage holds more than an even share of the layers, no middle one over a layer more."""
    slots, share = stage_slots(c, w), -(-w.model.num_layers // c["pp"])
    outer = np.maximum(c["num_layers_in_first_pipeline_stage"], c["num_layers_in_last_pipeline_stage"])
    return ~_uneven(c) | ((outer <= share) & (slots.middle <= share + 1))


def _explain_even(x: Layout, w: Workload) -> str:
    extra = x.account_for_embedding_in_pipeline_split + x.account_for_loss_in_pipeline_split
    total = w.model.num_layers + extra
    return (
        remainder("num_layers" if not extra else f"num_layers + {extra} accounted slots", total, "pp", x.pp)
        + ": choose another pp, state the first or last stage's layers, or account for embedding and loss"
    )


def _explain_rest(x: Layout, w: Workload) -> str:
    first, last = x.num_layers_in_first_pipeline_stage, x.num_layers_in_last_pipeline_stage
    stages = x.pp - (first > 0) - (last > 0)
    rest = w.model.num_layers - first - last
    return (
        f"num_layers ({w.model.num_layers}) - first ({first}) - last ({last}) = {rest} layers do not go "
        "evenly onto "
        f"the {stages} stages left of pp ({x.pp}): change the first or last stage's layers"
    )


def _explain_chunks(x: Layout, w: Workload) -> str:
    slots = stage_slots(Columns.single(x), w)
    first, middle, last = (int(part[0]) for part in slots)
    return (
        f"vpp ({x.vpp}) must divide the layers of every pipeline rank (first {first}, middle {middle}, last "
        f"{last}, "
        "embedding and loss counted where accounted for): choose another vpp or split"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "vpp-needs-pp",
        "megatron",
        "pp vpp",
        holds=lambda c, w, k: (c["vpp"] == 1) | (c["pp"] > 1),
        message=lambda x, w, k: f"vpp is {x.vpp}, but pp is {x.pp}: interleaving needs pp > 1; set vpp 1",
        source="megatron/core/parallel_state.py, initialize_model_parallel",
    ),
    rule(
        "uneven-split-needs-pp",
        "canonical",
        SPLIT,
        holds=lambda c, w, k: (c["pp"] > 1) | ~(_uneven(c) | _accounts(c)),
        message=lambda x, w, k: (
            f"pp is {x.pp}: one stage holds all {w.model.num_layers} layers; leave first and last at 0 and "
            "account_for_* off"
        ),
        source=BLOCK,
    ),
    rule(
        "uneven-or-accounted",
        "megatron",
        f"{UNEVEN} {ACCOUNT}",
        holds=lambda c, w, k: ~(_uneven(c) & _accounts(c)),
        message=lambda x, w, k: (
            f"first ({x.num_layers_in_first_pipeline_stage}) or last ({x.num_layers_in_last_pipeline_stage}) "
            "is "
            "stated and account_for_* is on: choose one of the two ways"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-by-pp",
        "megatron",
        f"{SPLIT} {TEXT}",
        holds=lambda c, w, k: _even_split(c, w),
        message=lambda x, w, k: _explain_even(x, w),
        source=BLOCK,
    ),
    rule(
        "uneven-rest-by-stages",
        "megatron",
        SPLIT,
        holds=lambda c, w, k: _rest_fits(c, w),
        message=lambda x, w, k: _explain_rest(x, w),
        source=f"{TRANSFORMER_CONFIG}; where it lets a negative rest pass, layers would be missing",
    ),
    rule(
        "stage-layers-by-vpp",
        "megatron",
        f"vpp {SPLIT} {TEXT}",
        holds=lambda c, w, k: _chunks_even(c, w),
        message=lambda x, w, k: _explain_chunks(x, w),
        source=BLOCK,
    ),
    rule(
        "uneven-chunks-need-a-middle",
        "megatron",
        f"pp vpp {UNEVEN}",
        holds=lambda c, w, k: (
            (c["vpp"] == 1)
            | (c["pp"] != 2)
            | (c["num_layers_in_first_pipeline_stage"] == 0)
            | (c["num_layers_in_last_pipeline_stage"] == 0)
        ),
        message=lambda x, w, k: (
            f"pp is {x.pp} with first ({x.num_layers_in_first_pipeline_stage}) and last "
            f"({x.num_layers_in_last_pipeline_stage}) both stated: with vpp ({x.vpp}) > 1 Megatron divides "
            "by the 0 "
            "middle stages; state the first alone"
        ),
        source="megatron/core/transformer/transformer_layer.py, get_transformer_layer_offset",
    ),
    rule(
        "uneven-split-says-something",
        "canonical",
        SPLIT,
        holds=lambda c, w, k: _says_something(c, w),
        message=lambda x, w, k: (
            f"first ({x.num_layers_in_first_pipeline_stage}) or last ({x.num_layers_in_last_pipeline_stage}) "
            "repeats "
            f"what pp {x.pp} leaves to that stage of {w.model.num_layers} layers anyway (with two stages "
            "only the first "
            "is stated): set it to 0"
        ),
        source=BLOCK,
    ),
    rule(
        "uneven-split-not-as-accounted",
        "canonical",
        f"vpp {SPLIT}",
        holds=lambda c, w, k: _not_as_accounted(c, w),
        message=lambda x, w, k: (
            f"first ({x.num_layers_in_first_pipeline_stage}) and last "
            f"({x.num_layers_in_last_pipeline_stage}) of "
            f"{w.model.num_layers} layers on pp {x.pp} are one layer short of the other stages: write "
            "account_for_embedding_in_pipeline_split or account_for_loss_in_pipeline_split instead"
        ),
        source=BLOCK,
    ),
    rule(
        "accounted-split-says-something",
        "canonical",
        f"pp vpp {ACCOUNT}",
        holds=lambda c, w, k: (
            ~(
                c.on("account_for_embedding_in_pipeline_split")
                & c.on("account_for_loss_in_pipeline_split")
                & (c["pp"] == 2)
                & (c["vpp"] == 1)
            )
        ),
        message=lambda x, w, k: (
            f"with pp {x.pp} and vpp {x.vpp} each stage holds either the embedding or the loss, so to "
            "account for both "
            f"splits {w.model.num_layers} layers as to account for none: turn both off"
        ),
        source=BLOCK,
    ),
    rule(
        "uneven-split-balanced",
        "policy",
        SPLIT,
        holds=lambda c, w, k: _balanced(c, w),
        message=lambda x, w, k: (
            f"first ({x.num_layers_in_first_pipeline_stage}) and last "
            f"({x.num_layers_in_last_pipeline_stage}) leave a "
            f"stage with more than its even share of {w.model.num_layers} layers / pp ({x.pp}) = "
            f"{-(-w.model.num_layers // x.pp)} (a middle stage may hold one more): every step waits for the "
            "slowest "
            "stage; change the split, or lift this rule"
        ),
        source=(
            "ours: outer stages also hold the embedding or the loss, so a split that helps makes them lighter"
        ),
    ),
)
