"""The layers in each chunk of each pipeline rank, for many layouts at once.

The predictors of memory and of time both use it.
"""

from dataclasses import dataclass

import numpy as np

from tuner.core.columns import Bools, Columns, Ints
from tuner.core.pipeline_layout import DECODER, EMBEDDING, LOSS, MTP, parse
from tuner.core.stages import stage_slots
from tuner.core.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The layers in each chunk of each pipeline rank. Every array has the shape [ranks, chunks].

    The layers of the model run through chunk 0 of every rank, then through chunk 1 of every rank, and so on.
    """

    begin: Ints
    """Index of the first decoder layer of the chunk, counted from 0 over the model."""
    end: Ints
    """Index of the last decoder layer of the chunk, plus 1; equal to `begin` in a chunk without layers."""
    embeddings: Ints
    """1 for the chunk that contains the embedding, else 0."""
    mtp_layers: Ints
    """Number of layers of multi-token prediction in the chunk."""
    losses: Ints
    """1 for the chunk that contains the final norm, the output layer and the loss, else 0."""
    is_written: bool
    """Whether the text of `pipeline_model_parallel_layout` states the partition; if not, all ranks between the first
    and the last have equally many layers."""

    @property
    def layers(self) -> Ints:
        """Return the number of decoder layers of each chunk."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Partitions:
    """The partitions of many layouts; layouts that divide the layers in the same way share one."""

    distinct: tuple[Partition, ...]
    """The different partitions."""
    of_row: Ints
    """For each layout, the index of its partition in `distinct`; shape [rows]."""


def partitions(c: Columns, workload: Workload) -> Partitions:
    """Return the partition of every layout; the layouts must satisfy the rules for pipelines."""
    keys, texts = _keys(c, workload)
    # Sorting one number per row is many times faster than sorting rows of numbers.
    _, index, of_row = np.unique(
        np.ravel_multi_index(tuple(keys), tuple(keys.max(axis=1) + 1)), return_index=True, return_inverse=True
    )
    mtp = workload.model.mtp_num_layers or 0
    distinct = tuple(
        _written(texts[key[0] - 1], int(key[1])) if key[0] else _spread(key, mtp) for key in keys[:, index].T
    )
    return Partitions(distinct=distinct, of_row=of_row)


def _keys(c: Columns, workload: Workload) -> tuple[Ints, list[str]]:
    """Return the numbers that determine the partition of each layout, shape [8, rows], and the layouts' texts.

    The numbers are: the index of the layout's text in the texts plus 1, or 0 without a text; pp; vpp; the slots (see
    `stage_slots`) of the first, a middle and the last rank; and whether the embedding and the loss take slots.
    """
    column = c.column("pipeline_model_parallel_layout")
    texts = [text for text in column.categories if text != "none"]
    number = {text: index for index, text in enumerate(texts, start=1)}
    text = np.array([number.get(category, 0) for category in column.categories])[column.codes]
    spread: Bools = text == 0
    accounted = (c["pp"] > 1) & spread
    keys = (
        text,
        c["pp"],
        c["vpp"],
        *(np.where(spread, slots, 0) for slots in stage_slots(c, workload)),
        c.on("account_for_embedding_in_pipeline_split") & accounted,
        c.on("account_for_loss_in_pipeline_split") & accounted,
    )
    return np.stack([np.asarray(key, dtype=np.int64) for key in keys]), texts


def _written(text: str, pp: int) -> Partition:
    """Return the partition that `text`, a value of `pipeline_model_parallel_layout`, states for `pp` ranks."""
    chunks = parse(text)

    def count(letter: str) -> Ints:
        return np.array([chunk.count(letter) for chunk in chunks], dtype=np.int64).reshape(-1, pp).T

    return _of_layers(
        count(DECODER),
        embeddings=count(EMBEDDING),
        mtp_layers=count(MTP),
        losses=count(LOSS),
        is_written=True,
    )


def _spread(key: Ints, mtp_num_layers: int) -> Partition:
    """Return the partition of a layout that does not state `pipeline_model_parallel_layout`.

    `key` has the eight numbers of the layout that `_keys` returns. All chunks of a rank have equally many slots.
    """
    _, pp, vpp, first, middle, last, embedding, loss = key.tolist()
    layers = np.full((pp, vpp), middle // vpp)
    layers[-1] = last // vpp
    layers[0] = first // vpp
    layers[0, 0] -= embedding
    layers[-1, -1] -= loss
    embeddings, losses = np.zeros_like(layers), np.zeros_like(layers)
    embeddings[0, 0], losses[-1, -1] = 1, 1
    return _of_layers(
        layers,
        embeddings=embeddings,
        mtp_layers=losses * mtp_num_layers,
        losses=losses,
        is_written=False,
    )


def _of_layers(
    layers: Ints, *, embeddings: Ints, mtp_layers: Ints, losses: Ints, is_written: bool
) -> Partition:
    """Return the partition whose chunks have `layers` decoder layers, an array of shape [ranks, chunks]."""
    end = np.cumsum(layers.T).reshape(layers.T.shape).T
    return Partition(
        begin=end - layers,
        end=end,
        embeddings=embeddings,
        mtp_layers=mtp_layers,
        losses=losses,
        is_written=is_written,
    )
