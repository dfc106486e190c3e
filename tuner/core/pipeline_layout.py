"""The text of `pipeline_model_parallel_layout`, which states the layers in each chunk of the pipeline."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuner.core.layout import MOST

EMBEDDING: Final = "E"
DECODER: Final = "t"
MTP: Final = "m"
LOSS: Final = "L"
LETTERS: Final = (EMBEDDING, DECODER, MTP, LOSS)
"""Megatron's letters: embedding, decoder layer, layer of multi-token prediction, and output layer with loss."""

Chunk = tuple[str, ...]
"""The letters of one chunk."""

_LONGEST: Final = 8192
"""Characters of the longest text that is read. Assumed: no job has a thousand chunks that all differ."""

_REPEATS: Final = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))
"""Match repeated groups (`(tt|)*4`) and repeated letters (`t*3`), in the order in which Megatron unrolls them."""


@lru_cache(maxsize=1024)
def parse(text: str) -> tuple[Chunk, ...]:
    """Return the letters of every chunk, in the model's order.

    Chunk i of the result is chunk i // pp of pipeline rank i % pp.

    The grammar is Megatron's (megatron/core/transformer/pipeline_parallel_layer_layout.py, parse_str_to_list): `|` ends
    a chunk, `t*3` repeats a letter, `(tt|)*4` repeats a group, groups do not nest, and commas are ignored.

    Raises:
        ValueError: if Megatron cannot read the text, or a repeat in it unrolls to more than MOST letters.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"pipeline_model_parallel_layout: the text is longer than {_LONGEST:,} characters")
    unrolled = text.replace(",", "")
    for repeat in _REPEATS:
        unrolled = _unrolled(repeat, unrolled)
    if unknown := sorted({*unrolled} - {*LETTERS, "|"}):
        raise ValueError(
            f"pipeline_model_parallel_layout '{text}': {' '.join(unknown)} has no meaning there; the letters are "
            "E (embedding), t (decoder layer), m (multi-token prediction) and L (loss), | ends a chunk, *3 repeats a "
            "letter or a (group)"
        )
    return tuple(tuple(chunk) for chunk in unrolled.split("|"))


def write(chunks: Iterable[Iterable[str]]) -> str:
    """Return the text that states these chunks, with repeated letters and chunks abbreviated.

    `parse(write(chunks))` equals `chunks`.
    """
    texts = ["".join(_shortened(chunk)) for chunk in chunks]
    runs = [(text, len(list(run))) for text, run in groupby(texts[:-1])]
    return "".join(f"({text}|)*{count}" if count > 1 else f"{text}|" for text, count in runs) + texts[-1]


def readable(text: str) -> bool:
    """Return whether Megatron can read the text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def decoders(text: str) -> NDArray[np.int64]:
    """Return the number of decoder layers in each chunk, in the model's order: shape [pp * vpp]."""
    return np.array([chunk.count(DECODER) for chunk in parse(text)], dtype=np.int64)


def fault(text: str, num_layers: int, mtp_num_layers: int | None) -> str | None:
    """Return why Megatron refuses the text for a model with these numbers of layers, or None if it accepts the text.

    The checks are those of pipeline_parallel_layer_layout.py, validate_layer_layout, that do not depend on pp;
    `mtp_fault` makes the one check that does.
    """
    try:
        chunks = parse(text)
    except ValueError as error:
        return str(error)
    flat = [letter for chunk in chunks for letter in chunk]
    count = Counter(flat)
    mtp = mtp_num_layers or 0
    if not flat or flat[0] != EMBEDDING or count[EMBEDDING] != 1:
        return f"the first letter of '{text}' must be E, and the only E"
    if flat[-1] != LOSS or count[LOSS] != 1:
        return f"the last letter of '{text}' must be L, and the only L"
    if count[DECODER] != num_layers:
        return f"'{text}' places {count[DECODER]} decoder layers (t), but num_layers is {num_layers}"
    if count[MTP] != mtp:
        return (
            f"'{text}' places {count[MTP]} layers of multi-token prediction (m), but mtp_num_layers is {mtp}"
        )
    if MTP in flat and DECODER in flat[flat.index(MTP) :]:
        return f"'{text}' has a decoder layer (t) after multi-token prediction (m)"
    if sum(MTP in chunk for chunk in chunks) > 1:
        return f"'{text}' spreads multi-token prediction (m) over several chunks; it must be in one"
    return None


def mtp_fault(text: str, pp: int) -> str | None:
    """Return why Megatron refuses the chunk of multi-token prediction in a pipeline of `pp` ranks, or None.

    Multi-token prediction must be in the last chunk of its rank.
    """
    chunks = parse(text)
    places = [place for place, chunk in enumerate(chunks) if MTP in chunk]
    if places and places[0] < len(chunks) - pp:
        return (
            f"'{text}' has multi-token prediction (m) in chunk {places[0] + 1} of {len(chunks)}; with pp {pp} it must "
            f"be in one of the last {pp}, the last virtual stage of a rank"
        )
    return None


def _unrolled(repeat: re.Pattern[str], text: str) -> str:
    """Return a text with the repeated letters or groups that a pattern of `_REPEATS` finds, written out in full.

    Raises:
        ValueError: if they are more letters than a job can have layers.
    """
    length = 0
    for group, times in repeat.findall(text):
        length += len(group) * int(times)
        if length > MOST:
            raise ValueError(
                f"pipeline_model_parallel_layout: '{group}' repeated {times} times unrolls to more than {MOST} letters"
            )
    return repeat.sub(lambda match: match[1] * int(match[2]), text)


def _shortened(chunk: Iterable[str]) -> Iterable[str]:
    """Yield a text for each run of equal letters; a run of three or more is abbreviated, such as `t*3`."""
    for letter, run in groupby(chunk):
        count = len(list(run))
        yield letter * count if count < 3 else f"{letter}*{count}"
