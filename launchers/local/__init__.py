"""Jobs of this machine alone: torchrun, and the process that forks it; knows nothing of other machines."""
