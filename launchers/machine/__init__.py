"""Finds out what this machine is and can do: GPUs, calibration, Megatron Bridge. It knows nothing of sweeps."""
