"""Texts of `pipeline_model_parallel_layout` worth trying: balanced ones that no other knobs can express."""

from collections.abc import Iterable
from itertools import islice, product

from tuner.core.pipeline_layout import DECODER, EMBEDDING, LOSS, MTP, write
from tuner.core.workload import Workload
from tuner.rules.placement import plain_split

MOST_TEXTS = 127
"""The largest number of texts in one column of the table, whose codes have 8 bits."""


def layer_placements(workload: Workload, pp: int, vpp: int) -> tuple[str, ...]:
    """Return at most two texts of `pipeline_model_parallel_layout` for `pp` ranks with `vpp` chunks each.

    Both divide the layers so that the fullest chunk has as few as possible. The loss counts as a layer, and so does
    every layer of multi-token prediction; the last chunk has all of these. The embedding counts as a layer in one of
    the texts only. A text that other knobs can express is left out.
    """
    chunks, mtp_layers = pp * vpp, workload.model.mtp_num_layers or 0
    texts: dict[str, None] = {}
    for embedding_slots in (0, 1):
        layers = _balanced_layers(workload.model.num_layers, chunks, embedding_slots, 1 + mtp_layers)
        text = write(_chunk_letters(index, layers, mtp_layers) for index in range(chunks))
        if plain_split(text, pp) is None:
            texts[text] = None
    return tuple(texts)


def placements_of(workload: Workload, pp_sizes: Iterable[int], vpp_sizes: Iterable[int]) -> tuple[str, ...]:
    """Return "none" and the texts of `layer_placements` for every pipeline of these sizes, the fewest chunks first.

    At most MOST_TEXTS values are returned.
    """
    most_chunks = workload.model.num_layers + 1
    pipelines = [(pp, vpp) for pp, vpp in product(pp_sizes, vpp_sizes) if pp > 1 and pp * vpp <= most_chunks]
    pipelines.sort(key=lambda sizes: (sizes[0] * sizes[1], sizes))
    texts = dict.fromkeys(text for pp, vpp in pipelines for text in layer_placements(workload, pp, vpp))
    return ("none", *islice(texts, MOST_TEXTS - 1))


def _balanced_layers(layers: int, chunks: int, first_slots: int, last_slots: int) -> tuple[int, ...]:
    """Return the number of layers of each chunk, as evenly divided as possible.

    Each layer is added to the chunk that is least full so far; among several such chunks, to the first. At the start,
    the first and the last chunk count as holding `first_slots` and `last_slots` layers, for their other parts.
    """
    other_slots = [0] * chunks
    other_slots[0] += first_slots
    other_slots[-1] += last_slots
    counts = [0] * chunks
    for _ in range(layers):
        lightest = min(range(chunks), key=lambda index: (counts[index] + other_slots[index], index))
        counts[lightest] += 1
    return tuple(counts)


def _chunk_letters(index: int, layers: tuple[int, ...], mtp_layers: int) -> str:
    """Return the letters of the chunk with this index, given the number of layers of every chunk."""
    start = EMBEDDING if index == 0 else ""
    end = MTP * mtp_layers + LOSS if index == len(layers) - 1 else ""
    return start + DECODER * layers[index] + end
