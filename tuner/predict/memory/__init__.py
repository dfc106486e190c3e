"""Predicted peak memory of a rank, added up from what each module of Megatron allocates.

This room does not predict the time of a step; tuner/predict/time does.
"""
