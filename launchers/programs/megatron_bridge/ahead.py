"""Importing this module imports, once, what the forked ranks of many trials share: Bridge on CPU, only torch on CUDA.

A fork cannot use CUDA once the process that it was forked from has used it, and packages that Bridge imports may do so.
"""

import importlib

import torch

from launchers.programs.megatron_bridge.cpu import hide_transformer_engine

if torch.cuda.is_available():
    import torch._dynamo
else:
    hide_transformer_engine()
    importlib.import_module("launchers.programs.megatron_bridge.train")
