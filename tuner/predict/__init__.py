"""Predictions of peak memory and step time for layouts, with or without a calibration of the machine.

This room knows nothing of a sweep or its trials.
"""
