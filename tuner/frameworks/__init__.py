"""Reads and writes the scripts, recipes and configs of other frameworks, one room per framework.

This room knows the contract of a trial, and nothing of rules, predictions, measurements or sweeps.
"""
