"""Reads and writes command lines of Megatron-LM. This room knows nothing of other frameworks."""
