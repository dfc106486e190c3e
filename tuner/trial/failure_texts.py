"""Regular expressions that recognise kinds of failure in the message of an exception or in a line of a log.

`tests/failure_texts.yaml` holds real messages with their sources. Every pattern here matches at least one of them.
"""

import re
from typing import Final


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


BROKEN_MACHINE: Final = _any_of(
    # torch, as it initialises CUDA
    r"cannot re-initialize cuda in forked subprocess",
    r"unexpected error from cudagetdevicecount\(\)",
    r"cuda unknown error",
    r"cuda driver initialization failed",
    r"nvidia driver on your system",
    r"no cuda gpus are available",
    r"torch not compiled with cuda enabled",
    # CUDA's own texts for errors, which torch, NCCL, Transformer Engine and DeepEP quote
    r"driver version is insufficient for cuda runtime version",
    r"system not yet initialized",
    r"system has unsupported display driver",
    r"forward compatibility was attempted on non supported hw",
    r"no cuda-capable device is detected",
    r"cuda-capable device\(s\) is/are busy or unavailable",
    r"invalid device ordinal",
    r"uncorrectable (?:ecc|nvlink) error",
    r"no kernel image is available",
    r"mps client failed to connect",
    r"mps server is not ready",
    r"cuda failure (?:\d+ )?'(?:unknown error|initialization error|unspecified launch failure)'",
    # NVML and the driver
    r"failed to initialize nvml",
    r"driverapi::get\(\)->nvml\w+\(.*internal assert failed",
    r"gpu is lost",
    r"fallen off the bus",
    # things that a compiler or NCCL lacks on the machine
    r"failed to find c compiler",
    r"error while creating shared memory segment",
)
"""Matches failures which mean that the machine cannot run any trial, or that one of its GPUs is broken."""

OUT_OF_MEMORY: Final = _any_of(
    r"outofmemoryerror",
    r"cuda out of memory",
    r"cuda_error_out_of_memory",
    r"cuda (?:driver )?error(?: \S+:\d+)?:? '?out of memory",
    r"triton error \[cuda\]: out of memory",
    # torch asks NVML who holds the memory only after an allocation has failed; in a MIG slice it may not ask
    r"nvml_success == r internal assert failed",
    r"cuda failure (?:\d+ )?'out of memory'",
    r"failed to cuda (?:calloc|malloc|host alloc)(?: async)? \d+ bytes",
    r"cublas_status_alloc_failed",
    r"cublas_status_not_initialized when calling `?cublas(?:lt)?create",
    r"cublas error: the (?:requested )?resource allocation failed",
    r"cudnn_status_(?:alloc_failed|not_initialized|internal_error_(?:host|device)_allocation_failed)",
    r"cumemcreate failed",
    r"defaultcpuallocator: (?:can't allocate|not enough) memory",
    r"std::bad_alloc",
)
"""Matches failures which mean that the memory of a GPU, or of the host, does not suffice."""

WATCHDOG: Final = _any_of(r"watchdog caught collective operation timeout")
"""Matches the message with which NCCL's watchdog ends a job because a collective takes too long."""

COMMUNICATION: Final = _any_of(
    r"nccl error",
    r"nccl communicator was aborted",
    r"nccl(?:unhandledcuda|remote|system)error",
    r"dist(?:backend|network)error",
    r"rendezvous\w*error",
    r"eaddrinuse",
    r"address already in use",
    r"gloo/transport",
    r"third_party/gloo",
    r"connection (?:closed by peer|refused|reset by peer)",
    r"broken pipe",
    r"socket timeout",
    r"timed out waiting",
    r"wait timeout",
    WATCHDOG.pattern,
)
"""Matches failures which mean that ranks cannot reach one another."""

DEVICE: Final = _any_of(r"cuda (?:driver )?error", r"cuda_error_", r"triton error \[cuda\]")
"""Matches errors that a GPU reports; those that another pattern here matches, too, have that pattern's meaning."""

FULL_DISK: Final = _any_of(r"no space left on device", r"disk quota exceeded", r"\benospc\b", r"\bedquot\b")
"""Matches failures which mean that a disk is full."""
