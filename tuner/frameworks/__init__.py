"""Readers and writers of the scripts, recipes and configs of other frameworks, one room per framework.

Knows trials; knows nothing of rules, predictions, measurements or sweeps.
"""
