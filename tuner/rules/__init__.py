"""Which layouts are valid: one object per rule.

This room knows nothing of predictions, of trials or of measurements.
"""
