"""The reader of Megatron Bridge's recipes and the writer of overrides for them; imports nothing of Bridge."""
