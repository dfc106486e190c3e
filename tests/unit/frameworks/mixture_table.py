"""Every valid layout of a small mixture of experts on 16 GPUs, enumerated once for the tests that draw from it."""

from tests.unit.layouts import cluster, mixture, workload
from tuner.space.domain import default_domain
from tuner.space.enumeration import enumerate_layouts

WORKLOAD, CLUSTER = workload(mixture()), cluster(16)
TABLE = enumerate_layouts(WORKLOAD, CLUSTER, default_domain(WORKLOAD, CLUSTER)).table
