"""The parallelism guide of Megatron Bridge: one class per table, read from `search_spaces/heuristics/`.

A field named tp, pp, cp, ep or etp is a number of ranks, as in `Layout`, or a range of such numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import ClassVar, Literal

from pydantic import ConfigDict

from tuner.files import STRICT, read_yaml

Range = tuple[int, int]
"""The lowest and the highest size; the sizes between are doublings of the lowest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseRow:
    """One row of the guide's table for dense models: the parallel sizes to start from for a range of model sizes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """The first cell of the row in the guide, which also names the row in a seed's source."""
    parameters_billions: tuple[float, float]
    """Numbers of parameters of the row's models, in 10^9: at least the first, and less than the second."""
    gpus: Range
    """Lowest and highest number of GPUs that the guide names for such models."""
    tp: Range
    pp: Range
    cp: Range


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeRow:
    """One row of the guide's table for mixtures of experts: the parallel sizes to start from for one model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """The first cell of the row in the guide, which also names the row in a seed's source."""
    model: str
    """The name of the built-in model that the row is about."""
    total_billions: float
    """Number of all parameters of the model, in 10^9."""
    active_billions: float
    """Number of parameters that take part in the forward pass of one token, in 10^9."""
    tp: int
    pp: int
    ep: int
    cp: int = 1
    note: str = ""
    """The guide's remark on the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A rule of thumb that the parallelism guide derives from its rows for mixtures of experts."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    """The pattern's name in kebab-case."""
    text: str
    """The pattern as a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyRow:
    """One row of the guide's table for networks: the parallel sizes to start from on a kind of network."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """The guide's name for the network, which also names the row in a seed's source."""
    network: Literal["nvlink", "infiniband", "ethernet"]
    """What connects the GPUs of a job: NVLink alone, or a fabric between nodes."""
    tp: int
    pp: int | None = None
    """Number of pipeline ranks; None if the guide states none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRow:
    """One row of the guide's table for sequence lengths: the parallelism that it adds for a range of lengths."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """The first cell of the row in the guide, which also names the row in a seed's source."""
    from_tokens: int
    """Length of the shortest sequences of the row, in tokens; the row ends where the next row begins."""
    sp: bool
    """Whether sequence parallelism is on, provided that tp is above 1."""
    cp: Range
    note: str = ""
    """The guide's remark on the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A combination of several kinds of parallelism that the parallelism guide writes out in full."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """The recipe's name in a seed's source."""
    model: str | None = None
    """The name of the built-in model that the recipe is for; None stands for any dense model."""
    gpus: int | None = None
    """Number of GPUs that the guide states, even if it is wrong; None if it states none."""
    tp: int
    pp: int
    cp: int = 1
    ep: int = 1
    sp: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MinimumGpus:
    """The parallelism guide's example of the smallest number of GPUs on which a layout fits."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    wrong_product: int
    """The product of all sizes, which the guide warns isn't the number of GPUs."""
    correct: int
    """The smallest number of GPUs on which the layout fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """The parallelism guide's example of a layout on a number of GPUs, with the data-parallel sizes that result."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    gpus: int
    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    dp: int
    """Number of replicas of the dense layers."""
    edp: int
    """Number of replicas of each expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts:
    """The parts of a job's memory, in decimal GB (10^9 bytes)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryExample:
    """The parallelism guide's worked example of a model's memory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    parameters_billions: float
    seq_length: int
    micro_batch_size: int
    tp: int
    pp: int
    dp: int
    whole_gb: MemoryParts
    """Memory of the whole model, before it is divided among GPUs."""
    per_gpu_gb: MemoryParts
    """Memory of each GPU: the whole divided by tp*pp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pitfall:
    """A mistake that the parallelism guide warns of."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: int
    """The pitfall's number in the guide."""
    text: str
    """The warning as a sentence."""
    rules: tuple[str, ...]
    """Ids of the rules (`tuner.rules.validity.RULES`) that refuse the mistake; empty if the guide only advises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Every table of the parallelism guide."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    document: str
    """The document that the tables are taken from."""
    sections: Mapping[str, str]
    """The title of the section of the guide that each table is taken from, by the name of the table's field in this
    class."""
    dense: tuple[DenseRow, ...]
    """The rows for dense models in ascending order of size, without gaps."""
    moe: tuple[MoeRow, ...]
    patterns: tuple[Pattern, ...]
    topology: tuple[TopologyRow, ...]
    infiniband_from_gb_per_s: float
    """The bandwidth from which a fabric counts as InfiniBand, in GB/s (10^9 bytes) per GPU; a slower one counts as
    Ethernet."""
    sequence: tuple[SequenceRow, ...]
    """The rows for sequence lengths in ascending order, from 0 tokens on."""
    recipes: tuple[Recipe, ...]
    minimum_gpus: tuple[MinimumGpus, ...]
    scaling: tuple[Scaling, ...]
    memory: MemoryExample
    pitfalls: tuple[Pitfall, ...]
    virtual_stages: int
    """Model chunks per pipeline rank in every layout with more than one pipeline rank that the guide recommends."""


@cache
def read_guide() -> Guide:
    """Return the parallelism guide that ships with the package; the file is read once per process."""
    with resources.as_file(resources.files("search_spaces")) as folder:
        return read_yaml(Guide, folder / "heuristics" / "parallelism-strategies.yaml")
