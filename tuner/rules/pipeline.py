"""Rules for the plain knobs that divide the layers among pipeline stages and chunks.

The plain knobs are all that do so except `pipeline_model_parallel_layout`, which tuner/rules/placement.py judges.
"""

import numpy as np

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.stages import accounted_slots, stage_slots, unstated_stages
from tuner.core.workload import Workload
from tuner.rules.placement import EMBEDDING_ACCOUNTED, FIRST, LAST, LOSS_ACCOUNTED, PLACEMENT
from tuner.rules.rule import Rule, implies, not_all, remainder, rule
from tuner.rules.sources import TRANSFORMER_CONFIG

LAYERS_TO_BUILD = "megatron/core/transformer/transformer_block.py, get_num_layers_to_build"
UNEVEN_KNOBS = f"{FIRST} {LAST}"
ACCOUNT_KNOBS = f"{EMBEDDING_ACCOUNTED} {LOSS_ACCOUNTED}"
SPLIT_KNOBS = f"pp {UNEVEN_KNOBS} {ACCOUNT_KNOBS}"


def _uneven(columns: Columns) -> Bools:
    """Return a mask of the rows that state the number of layers of the first or of the last stage."""
    return (columns[FIRST] > 0) | (columns[LAST] > 0)


def _accounted(columns: Columns) -> Bools:
    """Return a mask of the rows where the embedding or the loss counts as a layer."""
    return columns.on(EMBEDDING_ACCOUNTED) | columns.on(LOSS_ACCOUNTED)


def _plain(columns: Columns) -> Bools:
    """Return a mask of the rows where `pipeline_model_parallel_layout` is `none`."""
    return columns.among(PLACEMENT, "none")


def _even_split_is_whole(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    whole = (workload.model.num_layers + accounted_slots(columns)) % columns["pp"] == 0
    return implies(~_uneven(columns) & _plain(columns), whole)


def _rest_fits_stages(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where the stages without a stated number of layers can share the other layers evenly.

    This concerns rows that state the layers of the first or last stage; all other rows are accepted. Each stage must
    get at least one layer; if both stages of a pipeline are stated, no layer may be left.
    """
    rest, stages = workload.model.num_layers - columns[FIRST] - columns[LAST], unstated_stages(columns)
    spread = (stages > 0) & (rest > 0) & (rest % np.maximum(stages, 1) == 0)
    return implies(_uneven(columns), spread | ((stages == 0) & (rest == 0)))


def _chunks_are_whole(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where vpp divides the number of slots (see `stage_slots`) of every stage."""
    slots, vpp = stage_slots(columns, workload), columns["vpp"]
    middle_rest = np.where(unstated_stages(columns) > 0, slots.middle % vpp, 0)
    whole = slots.first % vpp + slots.last % vpp + middle_rest == 0
    return implies((columns["pp"] > 1) & _plain(columns), whole)


def _uneven_chunks_have_a_middle(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    both_stated = (columns[FIRST] != 0) & (columns[LAST] != 0)
    return not_all(columns["vpp"] != 1, columns["pp"] == 2, both_stated)


def _stated_stages_differ(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where each stated number of layers differs from what the stage would get by default.

    If there are two stages, only the layers of the first may be stated.
    """
    middle, stages = stage_slots(columns, workload).middle, unstated_stages(columns)
    repeats = (stages > 0) & ((columns[FIRST] == middle) | (columns[LAST] == middle))
    states_second_of_two = (columns["pp"] == 2) & (columns[LAST] > 0)
    return not_all(_uneven(columns), repeats | states_second_of_two)


def _uneven_differs_from_accounted(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows whose stated first and last stage cannot be expressed by the account_for_* knobs.

    Without virtual stages, each of these knobs takes one layer off the first or the last stage.
    """
    slots = stage_slots(columns, workload)
    fewer_first, fewer_last = slots.middle - slots.first, slots.middle - slots.last
    one_fewer = np.isin(fewer_first, (0, 1)) & np.isin(fewer_last, (0, 1)) & (fewer_first + fewer_last > 0)
    # With two stages, only the number of layers of the first is stated, and `middle` is the number that is left for the
    # last. So if the last stage has one layer less, `fewer_first` is -1.
    one_apart = (columns["pp"] == 2) & (np.abs(fewer_first) == 1)
    has_rest = (columns["pp"] > 1) & (unstated_stages(columns) != 0)
    return not_all(_uneven(columns), columns["vpp"] <= 1, has_rest, one_fewer | one_apart)


def _accounted_differs_from_even(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    both = columns.on(EMBEDDING_ACCOUNTED) & columns.on(LOSS_ACCOUNTED)
    return not_all(both, columns["pp"] == 2, columns["vpp"] == 1)


def _balanced(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    """Return a mask of the rows where no stage has many more layers than an even share, num_layers / pp rounded up.

    The first and the last stage may have at most this share, a middle stage at most one layer more.
    """
    share = -(-workload.model.num_layers // columns["pp"])
    fullest_outer = np.maximum(columns[FIRST], columns[LAST])
    light = (fullest_outer <= share) & (stage_slots(columns, workload).middle <= share + 1)
    return implies(_uneven(columns), light)


def _explain_even_split(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    slots = layout.account_for_embedding_in_pipeline_split + layout.account_for_loss_in_pipeline_split
    name = f"num_layers + {slots} accounted slots" if slots else "num_layers"
    return (
        f"{remainder(name, workload.model.num_layers + slots, 'pp', layout.pp)}: choose another pp, state the first or "
        "last stage's layers, or account for embedding and loss"
    )


def _explain_rest(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    stages = layout.pp - (first > 0) - (last > 0)
    rest = workload.model.num_layers - first - last
    return (
        f"num_layers ({workload.model.num_layers}) - first ({first}) - last ({last}) = {rest} layers do not divide "
        f"evenly among the {stages} stages left of pp ({layout.pp}): change the first or last stage's layers"
    )


def _explain_chunks(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    first, middle, last = (int(slots[0]) for slots in stage_slots(Columns.single(layout), workload))
    return (
        f"vpp ({layout.vpp}) must divide the layers of every pipeline rank (first {first}, middle {middle}, last "
        f"{last}, embedding and loss counted where accounted for): choose another vpp or split"
    )


def _stated(layout: Layout, conjunction: str) -> str:
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    return f"first ({first}) {conjunction} last ({last})"


RULES: tuple[Rule, ...] = (
    rule(
        "vpp-needs-pp",
        "megatron",
        "pp vpp",
        holds=lambda columns, workload, cluster: (columns["vpp"] == 1) | (columns["pp"] > 1),
        message=lambda layout, workload, cluster: (
            f"vpp is {layout.vpp}, but pp is {layout.pp}: interleaving needs pp > 1; set vpp 1"
        ),
        source="megatron/core/parallel_state.py, initialize_model_parallel",
    ),
    rule(
        "uneven-split-needs-pp",
        "canonical",
        SPLIT_KNOBS,
        holds=lambda columns, workload, cluster: (
            (columns["pp"] > 1) | ~(_uneven(columns) | _accounted(columns))
        ),
        message=lambda layout, workload, cluster: (
            f"pp is {layout.pp}: one stage holds all {workload.model.num_layers} layers; leave first and last at 0 and "
            "account_for_* off"
        ),
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "uneven-or-accounted",
        "megatron",
        f"{UNEVEN_KNOBS} {ACCOUNT_KNOBS}",
        holds=lambda columns, workload, cluster: not_all(_uneven(columns), _accounted(columns)),
        message=lambda layout, workload, cluster: (
            f"{_stated(layout, 'or')} is stated and account_for_* is on: choose one of the two ways"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-by-pp",
        "megatron",
        f"{SPLIT_KNOBS} {PLACEMENT}",
        holds=_even_split_is_whole,
        message=_explain_even_split,
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "uneven-rest-by-stages",
        "megatron",
        SPLIT_KNOBS,
        holds=_rest_fits_stages,
        message=_explain_rest,
        source=f"{TRANSFORMER_CONFIG}; where it lets a negative rest pass, layers would be missing",
    ),
    rule(
        "stage-layers-by-vpp",
        "megatron",
        f"vpp {SPLIT_KNOBS} {PLACEMENT}",
        holds=_chunks_are_whole,
        message=_explain_chunks,
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "uneven-chunks-need-a-middle",
        "megatron",
        f"pp vpp {UNEVEN_KNOBS}",
        holds=_uneven_chunks_have_a_middle,
        message=lambda layout, workload, cluster: (
            f"pp is {layout.pp} with {_stated(layout, 'and')} both stated: with vpp ({layout.vpp}) > 1 Megatron "
            "divides by the 0 middle stages; state the first alone"
        ),
        source="megatron/core/transformer/transformer_layer.py, get_transformer_layer_offset",
    ),
    rule(
        "uneven-split-says-something",
        "canonical",
        SPLIT_KNOBS,
        holds=_stated_stages_differ,
        message=lambda layout, workload, cluster: (
            f"{_stated(layout, 'or')} repeats what pp {layout.pp} leaves to that stage of {workload.model.num_layers} "
            "layers anyway (with two stages only the first is stated): set it to 0"
        ),
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "uneven-split-not-as-accounted",
        "canonical",
        f"vpp {SPLIT_KNOBS}",
        holds=_uneven_differs_from_accounted,
        message=lambda layout, workload, cluster: (
            f"{_stated(layout, 'and')} of {workload.model.num_layers} layers on pp {layout.pp} are one layer short of "
            f"the other stages: write {EMBEDDING_ACCOUNTED} or {LOSS_ACCOUNTED} instead"
        ),
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "accounted-split-says-something",
        "canonical",
        f"pp vpp {ACCOUNT_KNOBS}",
        holds=_accounted_differs_from_even,
        message=lambda layout, workload, cluster: (
            f"with pp {layout.pp} and vpp {layout.vpp} each stage holds either the embedding or the loss, so "
            f"accounting for both divides {workload.model.num_layers} layers as accounting for none does: turn both off"
        ),
        source=LAYERS_TO_BUILD,
    ),
    rule(
        "uneven-split-balanced",
        "policy",
        SPLIT_KNOBS,
        holds=_balanced,
        message=lambda layout, workload, cluster: (
            f"{_stated(layout, 'and')} leave a stage with more than its even share of {workload.model.num_layers} "
            f"layers / pp ({layout.pp}) = {-(-workload.model.num_layers // layout.pp)} (a middle stage may hold one "
            "more): every step waits for the slowest stage; change the split, or lift this rule"
        ),
        source=(
            "ours: outer stages also hold the embedding or the loss, so a split that helps makes them lighter"
        ),
    ),
)
