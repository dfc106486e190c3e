"""Computes what a sweep's measurements say: the ranking, the machine's drift, the finals and the answer.

This room knows finished trials, and nothing of how the search chooses what runs next.
"""
