"""The built-in program of a trial: it trains a Megatron-Core GPT model for a few steps and measures it."""
