"""Judges, without running it, whether a user's job would start and fit into GPU memory; knows nothing of sweeps."""
