"""Why layouts are fast or slow: what predictions and trials say about layouts, knobs and neighbours. Reads a sweep and
changes nothing.
"""
