"""Readers and writers of the scripts, recipes and configs of other frameworks, one room per framework.

This room knows trials, and nothing of rules, predictions, measurements or sweeps.
"""
