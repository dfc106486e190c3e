"""Time of one optimizer step, in milliseconds, from the work of each layer and message; knows nothing of memory
limits.
"""
