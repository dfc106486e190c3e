"""The predicted time of one optimizer step, in milliseconds, from the work of each layer and the bytes of each message.

This room knows nothing of memory limits.
"""
