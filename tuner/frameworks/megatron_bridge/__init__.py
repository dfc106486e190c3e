"""Reads what Megatron Bridge says of its recipes, and writes overrides for recipes.

This room imports nothing of Bridge, and knows nothing of other frameworks.
"""
