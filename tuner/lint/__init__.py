"""Judges whether a user's job would start and fit, without running it; knows nothing of sweeps."""
