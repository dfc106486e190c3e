"""Bounds the memory of a process that talks to MLflow, since the answer of a server may have no end."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

GROWTH_GIB = 1.0
"""How much more memory a process may take while it talks to MLflow, in GiB. Assumed; logging 1,000 trials takes 0.35
GiB in all, of which importing MLflow takes most, and each further trial takes 3 KiB."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit the memory of this process, within the `with` block, to what it has at the start plus GROWTH_GIB.

    An allocation beyond the limit raises MemoryError. Processes that are started in the block inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = psutil.Process().memory_info().data + round(GROWTH_GIB * 2**30)
    limits = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
