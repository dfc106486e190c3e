"""Megatron-LM's command lines: what reads them and what writes them; knows nothing of other frameworks."""
