"""Every valid layout of a search as one table, its look-ups, and the published layouts to start from; knows nothing
of what was measured.
"""
