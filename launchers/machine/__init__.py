"""Knows this machine: its identity, its GPUs, its speed, its Megatron Bridge; knows nothing of sweeps."""
