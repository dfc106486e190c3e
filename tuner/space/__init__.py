"""The table of all valid layouts of a search, its look-ups, and the published layouts to start from.

This room knows nothing of predictions or of what was measured.
"""
