"""Peak memory of a rank, in bytes, from what each module of Megatron keeps; knows nothing of time."""
