"""A module whose import uses CUDA, as that of Transformer Engine beside flash-attn does. No GPU is needed."""

import torch

torch.cuda.is_initialized = lambda: True
