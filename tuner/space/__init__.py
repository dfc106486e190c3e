"""Every valid layout of a search as one table, its look-ups, and the published layouts to start from.

This room knows nothing of predictions or of what was measured.
"""
