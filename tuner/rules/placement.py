"""Rules for `pipeline_model_parallel_layout`, the text that states the layers of every chunk."""

from collections.abc import Callable, Mapping
from itertools import product

from tuner.core.cluster import Cluster
from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.pipeline_layout import DECODER, MTP, fault, mtp_fault, parse, readable
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, implies, rule
from tuner.rules.sources import TRANSFORMER_CONFIG

PLACEMENT = "pipeline_model_parallel_layout"
FIRST = "num_layers_in_first_pipeline_stage"
LAST = "num_layers_in_last_pipeline_stage"
EMBEDDING_ACCOUNTED = "account_for_embedding_in_pipeline_split"
LOSS_ACCOUNTED = "account_for_loss_in_pipeline_split"
LAYER_LAYOUT = "megatron/core/transformer/pipeline_parallel_layer_layout.py"


def places_layers(text: str) -> bool:
    """Return whether a text is not `none` and can be parsed.

    A text that can't be parsed breaks the rule `layers-placed-whole`.
    """
    return text != "none" and readable(text)


def plain_split(text: str, pp: int) -> Mapping[str, int | bool] | None:
    """Return the knobs with which a layout divides the layers as `text` does over `pp` ranks, or None if no knobs can.

    `text` is a value of `pipeline_model_parallel_layout`. The knobs are those that state the layers of the first and
    last stage, or that count the embedding and the loss as a layer each. They give all chunks of a rank equally many
    layers (those counted included), and all ranks between the first and the last, too. Knobs at their default are left
    out, so an even split gives an empty mapping.
    """
    chunks = parse(text)
    if len(chunks) % pp or any(MTP in chunk for chunk in chunks[:-1]):
        return None
    layers = [chunk.count(DECODER) for chunk in chunks]
    for embedding, loss in product((False, True), repeat=2):
        if len({layers[0] + embedding, *layers[1:-1], layers[-1] + loss}) == 1:
            return _without_defaults({EMBEDDING_ACCOUNTED: embedding, LOSS_ACCOUNTED: loss})
    ranks = [set(layers[rank::pp]) for rank in range(pp)]
    # The value 0 leaves a stage unstated, so no knob can state a rank without layers.
    if any(len(rank) > 1 for rank in ranks) or len(set(map(frozenset, ranks[1:-1]))) > 1 or {0} in ranks:
        return None
    (first, *middle, last) = (sum(layers[rank::pp]) for rank in range(pp))
    usual = middle[0] if middle else last
    return _without_defaults({FIRST: first if first != usual else 0, LAST: last if last != usual else 0})


def _without_defaults(knobs: Mapping[str, int | bool]) -> Mapping[str, int | bool]:
    return {knob: value for knob, value in knobs.items() if value}


def _where_placed(columns: Columns, holds: Callable[[str, int], bool]) -> Bools:
    """Return a mask of the rows where `holds` returns True for the text and pp, or the text is `none` or unreadable."""
    return columns.text_with(PLACEMENT, "pp", lambda text, pp: not places_layers(text) or holds(text, pp))


def _text_fits_the_model(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    layers, mtp_layers = workload.model.num_layers, workload.model.mtp_num_layers
    return columns.text(PLACEMENT, lambda text: text == "none" or fault(text, layers, mtp_layers) is None)


def _chunks_are_a_multiple_of_pp(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return _where_placed(columns, lambda text, pp: len(parse(text)) % pp == 0)


def _chunks_are_pp_times_vpp(columns: Columns) -> Bools:
    chunks = columns.text_sizes(PLACEMENT, lambda text: len(parse(text)) if places_layers(text) else 0)
    return implies(chunks != 0, chunks == columns["pp"] * columns["vpp"])


def _mtp_is_on_last_chunks(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return _where_placed(columns, lambda text, pp: mtp_fault(text, pp) is None)


def _text_or_uneven(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    uneven = columns[FIRST] + columns[LAST] != 0
    return implies(uneven, columns.among(PLACEMENT, "none"))


def _text_or_accounted(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    accounted = columns.on(EMBEDDING_ACCOUNTED) | columns.on(LOSS_ACCOUNTED)
    return implies(accounted, columns.among(PLACEMENT, "none"))


def _no_plain_split_does_it(columns: Columns, workload: Workload, cluster: Cluster) -> Bools:
    return _where_placed(columns, lambda text, pp: plain_split(text, pp) is None)


def _explain_chunks(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    text = layout.pipeline_model_parallel_layout
    return (
        f"{PLACEMENT} '{text}' has {len(parse(text))} chunks, but pp*vpp = {layout.pp}*{layout.vpp} = "
        f"{layout.pp * layout.vpp}: change the text, pp or vpp"
    )


def _explain_fault(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    text, model = layout.pipeline_model_parallel_layout, workload.model
    return f"{fault(text, model.num_layers, model.mtp_num_layers)}: correct the text"


def _explain_plain_split(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    knobs = plain_split(layout.pipeline_model_parallel_layout, layout.pp) or {}
    split = ", ".join(f"{knob} {value}" for knob, value in knobs.items()) or "an even split"
    return (
        f"{PLACEMENT} '{layout.pipeline_model_parallel_layout}' on pp {layout.pp} and vpp {layout.vpp} places the "
        f"layers as {split} does: write that, and set it to none"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "layers-placed-with-pp",
        "canonical",
        f"pp {PLACEMENT}",
        holds=lambda columns, workload, cluster: (columns["pp"] > 1) | columns.among(PLACEMENT, "none"),
        message=lambda layout, workload, cluster: (
            f"pp is {layout.pp}: one stage holds all {workload.model.num_layers} layers; set {PLACEMENT} to none"
        ),
        source=LAYER_LAYOUT,
    ),
    rule(
        "layers-placed-whole",
        "megatron",
        PLACEMENT,
        holds=_text_fits_the_model,
        message=_explain_fault,
        source=f"{LAYER_LAYOUT}, validate_layer_layout",
    ),
    rule(
        "layers-placed-by-pp",
        "megatron",
        f"pp {PLACEMENT}",
        holds=_chunks_are_a_multiple_of_pp,
        message=_explain_chunks,
        source=LAYER_LAYOUT,
    ),
    rule(
        "layers-placed-by-chunks",
        "megatron",
        f"pp vpp {PLACEMENT}",
        holds=lambda columns, workload, cluster: (columns["vpp"] == 1) | _chunks_are_pp_times_vpp(columns),
        message=_explain_chunks,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-with-vpp",
        "canonical",
        f"pp vpp {PLACEMENT}",
        # With vpp 1 Megatron takes the number of virtual stages from the text.
        holds=lambda columns, workload, cluster: (columns["vpp"] > 1) | _chunks_are_pp_times_vpp(columns),
        message=_explain_chunks,
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mtp-placed-on-last-chunks",
        "megatron",
        f"pp {PLACEMENT}",
        holds=_mtp_is_on_last_chunks,
        message=lambda layout, workload, cluster: (
            f"{mtp_fault(layout.pipeline_model_parallel_layout, layout.pp)}: move it"
        ),
        source=f"{LAYER_LAYOUT}, validate_layer_layout",
    ),
    rule(
        "layers-placed-or-uneven",
        "megatron",
        f"{PLACEMENT} {FIRST} {LAST}",
        holds=_text_or_uneven,
        message=lambda layout, workload, cluster: (
            f"{PLACEMENT} places every layer, but first ({layout.num_layers_in_first_pipeline_stage}) or last "
            f"({layout.num_layers_in_last_pipeline_stage}) is stated: set them to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-or-accounted",
        "megatron",
        f"{PLACEMENT} {EMBEDDING_ACCOUNTED} {LOSS_ACCOUNTED}",
        holds=_text_or_accounted,
        message=lambda layout, workload, cluster: (
            f"{PLACEMENT} places every layer, but account_for_* is on: turn both off"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-say-something",
        "canonical",
        f"pp {PLACEMENT}",
        holds=_no_plain_split_does_it,
        message=_explain_plain_split,
        source=LAYER_LAYOUT,
    ),
)
