"""Predictions of peak memory and step time for layouts, with or without a calibration of the machine.

This room must not import anything about sweeps or trials.
"""
