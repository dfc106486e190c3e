"""Predicted peak memory and step time of rows of layouts; knows the nouns and a machine's calibration, and nothing of
a sweep or its trials.
"""
