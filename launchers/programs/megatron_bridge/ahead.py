"""What to import once for the forked ranks of many trials: Bridge, unless it might take hold of a GPU meanwhile.

What a fork may use of CUDA ends with its first use before the fork, and Bridge imports packages that are free to do so.
"""

import importlib

import torch

from launchers.programs.megatron_bridge.cpu import hide_transformer_engine

if torch.cuda.is_available():
    import torch._dynamo
else:
    hide_transformer_engine()
    importlib.import_module("launchers.programs.megatron_bridge.train")
