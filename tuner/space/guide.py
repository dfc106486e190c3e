"""The parallelism guide of Megatron Bridge: its tables as nouns, read from `search_spaces/heuristics/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.files import STRICT, read_yaml

Range = tuple[int, int]
"""Lowest and highest; the steps between are powers of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseRow:
    """Where to start with a dense model, by its size."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    parameters_billions: tuple[float, float]
    """From the first, to below the second."""
    gpus: Range
    tp: Range
    pp: Range
    cp: Range


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeRow:
    """Where to start with a mixture of experts."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    model: str
    """The built-in model that the row is about."""
    total_billions: float
    active_billions: float
    tp: int
    pp: int
    ep: int
    cp: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A rule of thumb behind the rows for mixtures of experts."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyRow:
    """Where to start on a kind of network."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    network: Literal["nvlink", "infiniband", "ethernet"]
    tp: int
    pp: int | None = None
    """None where the guide leaves it open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRow:
    """What a sequence length adds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    from_tokens: int
    sp: bool
    cp: Range
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A combination that the guide spells out."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    model: str | None = None
    """The built-in model it is for; None is any dense model."""
    gpus: int | None = None
    """As the guide states it, right or wrong."""
    tp: int
    pp: int
    cp: int = 1
    ep: int = 1
    sp: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MinimumGpus:
    """An example of the fewest GPUs of a layout, and of the product that is mistaken for it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    wrong_product: int
    correct: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """An example of both data-parallel sizes on a number of GPUs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    gpus: int
    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    dp: int
    edp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts:
    """Memory in decimal GB (10^9 bytes)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryExample:
    """The guide's worked example of a model's memory, unsharded and a GPU."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    parameters_billions: float
    seq_length: int
    micro_batch_size: int
    tp: int
    pp: int
    dp: int
    whole_gb: MemoryParts
    per_gpu_gb: MemoryParts


@dataclass(frozen=True, kw_only=True, slots=True)
class Pitfall:
    """A mistake the guide warns of, and the rules that refuse it; without rules it is advice."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: int
    text: str
    rules: tuple[str, ...]
    """Ids in `tuner.rules.RULES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Every table of the parallelism guide."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    document: str
    sections: Mapping[str, str]
    """The guide's section that each table is from, by field name."""
    dense: tuple[DenseRow, ...]
    """By size, ascending, without gaps."""
    moe: tuple[MoeRow, ...]
    patterns: tuple[Pattern, ...]
    topology: tuple[TopologyRow, ...]
    infiniband_from_gb_per_s: float
    """A fabric slower than this, in GB/s (10^9 bytes) a GPU, is a limited network."""
    sequence: tuple[SequenceRow, ...]
    """By length, ascending, from 0."""
    recipes: tuple[Recipe, ...]
    minimum_gpus: tuple[MinimumGpus, ...]
    scaling: tuple[Scaling, ...]
    memory: MemoryExample
    pitfalls: tuple[Pitfall, ...]
    virtual_stages: int
    """Model chunks a rank that an interleaved seed asks for."""


@cache
def read_guide() -> Guide:
    """Read the parallelism guide that ships with the package."""
    with resources.as_file(resources.files("search_spaces")) as folder:
        return read_yaml(Guide, folder / "heuristics" / "parallelism-strategies.yaml")
