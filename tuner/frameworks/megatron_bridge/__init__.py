"""Megatron Bridge's recipes and overrides: what reads them and what writes them; imports nothing of Bridge."""
