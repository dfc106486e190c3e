"""The work of one rank that is timed: launches of small operations, matrix products, and copies."""

from functools import partial
from itertools import product

import torch
from torch import nn

from launchers.programs.calibration.points import PointTable, TimedPoint, Work
from tuner.core.workload import Precision
from tuner.predict.calibration import CalibrationPlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MLP_OPERATIONS = 5
"""Number of operations that `small_mlp` launches: its four modules and a sum."""


def small_mlp(device: torch.device) -> Work:
    """Return the forward pass, with autograd, of an MLP so small that only launching its operations takes time."""
    modules = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
    mlp = nn.Sequential(*modules).to(device)
    state = torch.ones(8, 8, device=device)
    return lambda: state + mlp(state)


def products(plan: CalibrationPlan, precision: Precision, device: torch.device) -> PointTable:
    """Return a table of matrix products, one per planned shape (rows, output width, input width)."""
    sizes = (plan.gemm_sizes,) * 3
    points = [TimedPoint(partial(_product, shape, precision, device)) for shape in product(*sizes)]
    return PointTable(sizes, points)


def _product(shape: tuple[int, int, int], precision: Precision, device: torch.device) -> Work:
    """Return the matrix product of a linear layer's forward pass, called as the layer calls it.

    `shape` is (rows, output width, input width).
    """
    rows, output_width, input_width = shape
    inputs = torch.randn(rows, input_width, device=device)
    weights = torch.randn(output_width, input_width, device=device)
    if precision != "fp8":
        dtype = DTYPES[precision]
        inputs, weights = inputs.to(dtype), weights.to(dtype)
        return lambda: nn.functional.linear(inputs, weights)
    fp8_inputs, fp8_weights = inputs.to(torch.float8_e4m3fn), weights.to(torch.float8_e4m3fn).t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(fp8_inputs, fp8_weights, scale, scale, out_dtype=torch.bfloat16)


def copies(plan: CalibrationPlan, device: torch.device) -> PointTable:
    """Return a table of copies, one per planned number of bytes."""
    points = [TimedPoint(partial(_copy, moved_bytes, device)) for moved_bytes in plan.copy_bytes]
    return PointTable((plan.copy_bytes,), points)


def _copy(moved_bytes: int, device: torch.device) -> Work:
    """Return a copy that reads half of the bytes and writes the other half, as activation functions do.

    Each call writes to a new tensor.
    """
    source = torch.ones(moved_bytes // 8, device=device)
    return lambda: source * 0.5
