"""Every built-in model is built of Transformer Engine's modules, at its own size, as a CUDA trial builds it."""

from dataclasses import replace

import pytest

from search_spaces.loader import load_model, model_names
from tests.cuda.builds import built
from tuner.core.layout import Layout
from tuner.core.workload import Model

DATA_RANKS = 4


def layout_of(model: Model) -> Layout:
    """Return a layout with one layer per pipeline stage, and with expert parallelism if there are experts."""
    layout = Layout(tp=2, sp=True, pp=model.num_layers)
    return replace(layout, ep=4, etp=1) if model.is_moe else layout


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", model_names())
def test_a_model_is_built_of_transformer_engines_modules(name: str) -> None:
    model = load_model(name)
    layout = layout_of(model)
    world_size = layout.tp * layout.pp * DATA_RANKS
    for rank in (0, world_size - 1):
        with built(model, layout, rank, world_size, is_fake=True) as chunks:
            (layer,) = chunks[0].decoder.layers
            modules = {type(module).__name__ for module in layer.modules()}
            attention = (
                "TEDotProductAttention" if model.attn_logit_softcapping is None else "TorchCoreAttention"
            )
            assert {attention, "TERowParallelLinear"} <= modules
            assert ("TEGroupedMLP" in modules) == layer.is_moe_layer, modules
