"""The text that places every layer, `pipeline_model_parallel_layout`: whether it can be read, and fits the rest."""

from collections.abc import Callable, Mapping
from itertools import product

from tuner.core.columns import Bools, Columns
from tuner.core.layout import Layout
from tuner.core.pipeline_layout import DECODER, MTP, fault, mtp_fault, parse, readable
from tuner.core.workload import Workload
from tuner.rules.rule import Rule, rule
from tuner.rules.shapes import TRANSFORMER_CONFIG

TEXT = "pipeline_model_parallel_layout"
_UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_ACCOUNT = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
LAYER_LAYOUT = "megatron/core/transformer/pipeline_parallel_layer_layout.py"


def _placed(text: str) -> bool:
    """Whether there is a text that can be read; the one that cannot is `layers-placed-whole`'s."""
    return text != "none" and readable(text)


def _legal(text: str, w: Workload) -> bool:
    return text == "none" or fault(text, w.model.num_layers, w.model.mtp_num_layers) is None


def _where_placed(c: Columns, holds: Callable[[str, int], bool]) -> Bools:
    """What holds of the text and pp, where there is a text."""
    return c.text_with(TEXT, "pp", lambda text, pp: not _placed(text) or holds(text, pp))


def _chunks_fit(c: Columns) -> Bools:
    chunks = c.text_sizes(TEXT, lambda text: len(parse(text)) if _placed(text) else 0)
    holds: Bools = (chunks == 0) | (chunks == c["pp"] * c["vpp"])
    return holds


def plain_split(text: str, pp: int) -> Mapping[str, int | bool] | None:
    """The plain knobs that place the layers as the text does, defaults left out; None where they cannot.

    They give every chunk of a rank the same slots, and so every rank between the first and the last.
    """
    chunks = parse(text)
    if len(chunks) % pp or any(MTP in chunk for chunk in chunks[:-1]):
        return None
    layers = [chunk.count(DECODER) for chunk in chunks]
    for embedding, loss in product((False, True), repeat=2):
        if len({layers[0] + embedding, *layers[1:-1], layers[-1] + loss}) == 1:
            return _stated(dict(zip(_ACCOUNT, (embedding, loss), strict=True)))
    ranks = [set(layers[rank::pp]) for rank in range(pp)]
    # A stated 0 is none.
    if any(len(rank) > 1 for rank in ranks) or len(set(map(frozenset, ranks[1:-1]))) > 1 or {0} in ranks:
        return None
    (first, *middle, last) = (sum(layers[rank::pp]) for rank in range(pp))
    usual = middle[0] if middle else last
    return _stated({_UNEVEN[0]: first if first != usual else 0, _UNEVEN[1]: last if last != usual else 0})


def _stated(knobs: Mapping[str, int | bool]) -> Mapping[str, int | bool]:
    return {knob: value for knob, value in knobs.items() if value}


def _explain_plain(x: Layout) -> str:
    plain = plain_split(x.pipeline_model_parallel_layout, x.pp)
    told = ", ".join(f"{knob} {value}" for knob, value in (plain or {}).items()) or "an even split"
    return (
        f"{TEXT} '{x.pipeline_model_parallel_layout}' on pp {x.pp} and vpp {x.vpp} places the layers as {told} does: "
        "write that, and set it to none"
    )


RULES: tuple[Rule, ...] = (
    rule(
        "layers-placed-with-pp",
        "canonical",
        f"pp {TEXT}",
        holds=lambda c, w, k: (c["pp"] > 1) | c.among(TEXT, "none"),
        message=lambda x, w, k: (
            f"pp is {x.pp}: one stage holds all {w.model.num_layers} layers; set {TEXT} to none"
        ),
        source=LAYER_LAYOUT,
    ),
    rule(
        "layers-placed-whole",
        "megatron",
        TEXT,
        holds=lambda c, w, k: c.text(TEXT, lambda text: _legal(text, w)),
        message=lambda x, w, k: (
            f"{fault(x.pipeline_model_parallel_layout, w.model.num_layers, w.model.mtp_num_layers)}: correct the text"
        ),
        source=f"{LAYER_LAYOUT}, validate_layer_layout",
    ),
    rule(
        "layers-placed-by-pp",
        "megatron",
        f"pp {TEXT}",
        holds=lambda c, w, k: _where_placed(c, lambda text, pp: len(parse(text)) % pp == 0),
        message=lambda x, w, k: _explain_chunks(x),
        source=LAYER_LAYOUT,
    ),
    rule(
        "layers-placed-by-chunks",
        "megatron",
        f"pp vpp {TEXT}",
        holds=lambda c, w, k: (c["vpp"] == 1) | _chunks_fit(c),
        message=lambda x, w, k: _explain_chunks(x),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-with-vpp",
        "canonical",
        f"pp vpp {TEXT}",
        # Where no vpp is stated, Megatron takes the text's own.
        holds=lambda c, w, k: (c["vpp"] > 1) | _chunks_fit(c),
        message=lambda x, w, k: _explain_chunks(x),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "mtp-placed-on-last-chunks",
        "megatron",
        f"pp {TEXT}",
        holds=lambda c, w, k: _where_placed(c, lambda text, pp: mtp_fault(text, pp) is None),
        message=lambda x, w, k: f"{mtp_fault(x.pipeline_model_parallel_layout, x.pp)}: move it",
        source=f"{LAYER_LAYOUT}, validate_layer_layout",
    ),
    rule(
        "layers-placed-or-uneven",
        "megatron",
        f"{TEXT} num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage",
        holds=lambda c, w, k: (
            c.among(TEXT, "none")
            | (c["num_layers_in_first_pipeline_stage"] + c["num_layers_in_last_pipeline_stage"] == 0)
        ),
        message=lambda x, w, k: (
            f"{TEXT} places every layer, but first ({x.num_layers_in_first_pipeline_stage}) or last "
            f"({x.num_layers_in_last_pipeline_stage}) is stated: set them to 0"
        ),
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-or-accounted",
        "megatron",
        f"{TEXT} account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
        holds=lambda c, w, k: (
            c.among(TEXT, "none")
            | ~(c.on("account_for_embedding_in_pipeline_split") | c.on("account_for_loss_in_pipeline_split"))
        ),
        message=lambda x, w, k: f"{TEXT} places every layer, but account_for_* is on: turn both off",
        source=TRANSFORMER_CONFIG,
    ),
    rule(
        "layers-placed-say-something",
        "canonical",
        f"pp {TEXT}",
        holds=lambda c, w, k: _where_placed(c, lambda text, pp: plain_split(text, pp) is None),
        message=lambda x, w, k: _explain_plain(x),
        source=LAYER_LAYOUT,
    ),
)


def _explain_chunks(x: Layout) -> str:
    chunks = len(parse(x.pipeline_model_parallel_layout))
    return (
        f"{TEXT} '{x.pipeline_model_parallel_layout}' has {chunks} chunks, but pp*vpp = {x.pp}*{x.vpp} = "
        f"{x.pp * x.vpp}: change the text, pp or vpp"
    )
