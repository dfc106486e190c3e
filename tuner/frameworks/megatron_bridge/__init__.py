"""The reader of Megatron Bridge's recipes and the writer of overrides for them.

This room imports nothing of Bridge.
"""
