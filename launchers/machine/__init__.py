"""What this machine is and can do: its GPUs, its speed, its Megatron Bridge; knows nothing of sweeps."""
