"""What runs inside a trial: a program reads a TrialSpec, writes a TrialResult, and shares nothing else."""
