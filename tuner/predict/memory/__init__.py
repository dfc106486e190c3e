"""Predicted peak memory of a rank, added up from what each module of Megatron allocates.

This room knows nothing of step times.
"""
